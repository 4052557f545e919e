"""Training throughput: images and tokens per second, peak memory, and model FLOPs utilization (MFU).

FLOPs are those of the matrix products, by formula: a token costs two for every weight that it passes and, in each
attention layer, four for every element of the width and every token that it attends to (arXiv 2001.08361, section
2.1). The backward pass costs the same again for the inputs and, for trainable weights, once more. Recomputation by
gradient checkpointing is not counted, nor are a tokenizer's loss networks (perceptual networks, discriminator): MFU as
in PaLM (arXiv 2204.02311, appendix B).
"""

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from unimm.data.text.collators import IGNORED
from unimm.tokenizer import ImageTokenizer

PEAK_BF16: dict[str, float] = {
    "GB200": 2.45e15,
    "B200": 2.25e15,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "A10G": 70e12,
    "A10": 125e12,
    "A40": 150e12,
    "A6000": 155e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "MI300X": 1307e12,
    "MI250X": 383e12,
}
"""Part of the device's name -> peak FLOP/s of dense bfloat16 products with float32 accumulation, from data sheets."""


def peak_flops(device: torch.device, name: str | None = None) -> float | None:
    """Return the device's peak bfloat16 FLOP/s, None if unknown (any CPU); `name` overrides the device's own name."""
    if device.type != "cuda":
        return None
    words = set((name or torch.cuda.get_device_name(device)).replace("-", " ").upper().split())
    if words & {"MIG", "LAPTOP"}:  # a part of the device, or a slower one of the same name
        return None
    known = {key: peak for key, peak in PEAK_BF16.items() if set(key.upper().split()) <= words}
    return known[max(known, key=len)] if known else None


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: of allocated tensors on a GPU, of the resident process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # macOS reports bytes, Linux kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---- what a step takes ----


@dataclass(frozen=True)
class TransformerCost:
    """FLOPs of a transformer.

    Attributes:
        weights: number of weights in its matrices.
        learning: how many of them are trainable.
        attention: layers times width of its attention.
    """

    weights: int
    learning: int
    attention: int

    @classmethod
    def of(cls, model: nn.Module, layers: int, width: int, *, without: nn.Module | None = None) -> "TransformerCost":
        """Count all linear layers and convolutions of `model` but those in `without`; `width` is heads times head
        size."""
        left_out = set(without.modules()) if without is not None else set()
        matrices = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d) and m not in left_out]
        learning = [m for m in matrices if m.weight.requires_grad]
        return cls(sum(map(_elements, matrices)), sum(map(_elements, learning)), layers * width)

    def forward(self, tokens: int, context: int) -> int:
        """Return the FLOPs of `tokens` that each attend to `context` tokens (not halved for a causal mask)."""
        return tokens * (2 * self.weights + 4 * self.attention * context)

    def training(self, tokens: int, context: int) -> int:
        """Return the FLOPs of forward and backward: gradients of all activations and of the trainable weights."""
        return 2 * self.forward(tokens, context) + tokens * (2 * self.learning + 4 * self.attention * context)


def _elements(matrix: nn.Linear | nn.Conv2d) -> int:
    """Return the number of weights; from the layer's sizes, because 4-bit weights are stored packed."""
    return matrix.in_features * matrix.out_features if isinstance(matrix, nn.Linear) else matrix.weight.numel()


@dataclass
class Work:
    """Images, tokens and FLOPs of a micro-batch; tensors stay on the device until they are read, to avoid a sync."""

    images: float = 0
    tokens: float | Tensor = 0
    flops: float | Tensor = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.images + other.images, self.tokens + other.tokens, self.flops + other.flops)

    def __mul__(self, times: float) -> "Work":
        return Work(self.images * times, self.tokens * times, self.flops * times)


class HostCost:
    """FLOPs of training a unified model: language model on all tokens, head at the labels, frozen vision tower."""

    def __init__(self, model: Any) -> None:
        text, tower = model.config.get_text_config(), model.image_tokenizer
        heads = text.num_attention_heads
        width = heads * (getattr(text, "head_dim", None) or text.hidden_size // heads)
        head = model.get_output_embeddings()
        self.llm = TransformerCost.of(model.get_decoder(), text.num_hidden_layers, width, without=head)
        self.head = TransformerCost(head.weight.numel(), head.weight.numel() * head.weight.requires_grad, 0)
        vision = tower.config.encoder_copy()
        self.tower = TransformerCost.of(tower.encoder, vision.num_hidden_layers, vision.hidden_size)
        self.patches = tower.config.num_patches

    def of(self, batch: dict[str, Tensor]) -> Work:
        """Return the work of one flow's batch: input_ids [B, L], labels [B, L] and optional images or ids."""
        rows, length = batch["input_ids"].shape
        labels = (batch["labels"][:, 1:] != IGNORED).sum()
        seen = sum(len(batch[name]) for name in ("pixel_values", "drawn_pixel_values") if name in batch)
        images = seen + (len(batch["drawn_ids"]) if "drawn_ids" in batch else 0)  # ids need no tower
        reached = self.llm.learning or "pixel_values" in batch  # else no gradient passes
        llm = (self.llm.training if reached else self.llm.forward)(rows * length, length)
        head = (self.head.training if reached else self.head.forward)(1, 0)
        fixed = llm + seen * self.tower.forward(self.patches, self.patches)
        mask = batch.get("attention_mask")
        tokens = mask.sum() if mask is not None and mask.ndim == 2 else rows * length
        return Work(images, tokens, fixed + labels.float() * head)


def counted_flops(run: Callable[[], Any]) -> int:
    """Return the FLOPs of calling `run`, counted by torch per operator (which misses the CPU's fused attention)."""
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


@dataclass(frozen=True)
class TokenizerCost:
    """FLOPs of training a tokenizer: per image, and per batch (SimVQ projects its codebook once per batch)."""

    image: int
    batch: int

    @classmethod
    @torch.no_grad()
    def of(cls, tokenizer: ImageTokenizer, stage: int) -> "TokenizerCost":
        """Measure forward passes of one image and of two, whose difference is the cost per image.

        Stage 2 trains the encoder and runs a teacher, stage 3 trains the decoder alone; the nearest-code search has no
        backward.
        """
        config, side = tokenizer.config, tokenizer.config.image_size
        one, two = (
            torch.zeros(count, 3, side, side, device=tokenizer.device, dtype=tokenizer.dtype) for count in (1, 2)
        )
        verbs = (tokenizer.hidden_states, tokenizer.encode, tokenizer.reconstruct)
        once, twice = ([counted_flops(lambda: verb(x)) for verb in verbs] for x in (one, two))  # noqa: B023
        encoder, encoded, drawn = (b - a for a, b in zip(once, twice, strict=True))
        coded, drawn, fixed = encoded - encoder, drawn - encoded, 2 * once[1] - twice[1]
        search = 2 * config.num_image_tokens * config.codebook_size * config.codebook_dim
        if stage == 3:
            return cls(encoder + coded + 3 * drawn, fixed)
        return cls((4 if stage == 2 else 1) * encoder + 3 * (coded - search) + search + 3 * drawn, 2 * fixed)

    def training(self, images: int) -> float:
        """Return the FLOPs of one batch."""
        return float(images * self.image + self.batch)


# ---- what a run took ----


class Meter:
    """A meter of this process's work since the last reading; evaluations and checkpoints do not count as time."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.peak = peak_flops(accelerator.device)
        self.restart()

    def restart(self) -> None:
        """Reset work and time."""
        self._begun, self._idle = time.perf_counter(), 0.0
        self.total = Work()

    def add(self, work: Work) -> None:
        """Add the work of a micro-batch."""
        self.total = self.total + work

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock inside the context."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._idle += time.perf_counter() - start

    def read(self, samples_seen: int) -> dict[str, float]:
        """Return the scalars to log, summed over all processes, and restart; call it on every process."""
        total = [float(number) for number in (self.total.images, self.total.tokens, self.total.flops)]
        sums = torch.tensor(total, dtype=torch.float64)
        seconds = max(time.perf_counter() - self._begun - self._idle, 1e-9)
        if self.accelerator.num_processes > 1:
            sums = self.accelerator.reduce(sums.to(self.accelerator.device), "sum").cpu()
        images, tokens, flops = sums.tolist()
        self.restart()
        logs = {"samples_seen": float(samples_seen), "peak_memory_gib": peak_memory(self.accelerator.device) / 2**30}
        rates = {"images_per_second": images / seconds, "tokens_per_second": tokens / seconds}
        logs |= {name: rate for name, rate in rates.items() if rate}
        if self.peak is not None and flops:
            logs["mfu"] = flops / seconds / (self.peak * self.accelerator.num_processes)
        return logs

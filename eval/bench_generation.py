"""Benchmark image generation against other ways to sample image tokens from the same model.

    python eval/bench_generation.py --json runs/bench_generation.json
    python eval/bench_generation.py --model default --batches 1,4,16 --repeats 5
    python eval/bench_generation.py --width 1024 --layers 28 --image-tokens 1024 --dtype bfloat16

The default is a random Qwen3 of 31 million weights with 16384 codes and 256 image tokens, on a CPU in float32 with two
threads; the last command is Qwen3-0.6B, for a GPU. `bound` is the achieved share of the memory bandwidth: the bytes of
weights, keys and values that a step must read, divided by its time and by the bandwidth measured here. On a busy
machine compare `cpu s`, the processor time, instead.

The baselines use the same weights and prompt, as a plain causal language model with the image ids in its vocabulary:
transformers' `generate` with its classifier-free guidance (a second forward for the unconditional branch), with a
dynamic and with a static cache, and the simple loop of most image models, both branches batched in one forward. All run
interleaved in one process.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from unimm.errors import UserError, run_main
from unimm.mllm import attach, decoding
from unimm.mllm.export import causal_lm
from unimm.runs.provenance import git_commit
from unimm.runs.report import Report
from unimm.testing.hosts import text_tokenizer, vision_config
from unimm.tokenizer import VQRAE

PROMPT = "three red circles above a blue square"


def random_model(width: int, layers: int, codes: int, image_tokens: int, dtype: torch.dtype) -> tuple[Any, Any]:
    """Build a random Qwen3 (head dim 64, half as many key/value heads) with a tiny image tokenizer of `codes` codes."""
    side = round(image_tokens**0.5)
    encoder = vision_config("siglip_vision_model").to_dict() | {"image_size": 4 * side}
    image_tokenizer = VQRAE(VQRAE.config_class(encoder_config=encoder, codebook_size=codes, codebook_dim=8)).eval()
    texts: PreTrainedTokenizerBase = text_tokenizer(())
    heads = {"num_attention_heads": width // 64, "num_key_value_heads": width // 128, "head_dim": 64}
    config = Qwen3Config(
        vocab_size=2048,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        max_position_embeddings=2 * image_tokens + 256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        **heads,
    )
    return attach(Qwen3ForCausalLM(config).to(dtype).eval(), image_tokenizer, texts)


class _ImageIdsOnly(LogitsProcessor):
    def __init__(self, start: int) -> None:
        self.start = start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, : self.start] = -torch.inf
        return scores


@dataclass(frozen=True)
class Rivals:
    """Every way to generate `batch` images of one prompt with a model; each returns token_ids [batch, M]."""

    model: Any
    alone: Any
    prompt: Tensor
    batch: int
    scale: float

    @classmethod
    def of(cls, model: Any, processor: Any, batch: int, scale: float) -> "Rivals":
        prompt = processor(text=processor.drawing_prompt(PROMPT), return_tensors="pt").input_ids.to(model.device)
        alone = causal_lm(model).to(model.device).eval()
        return cls(model, alone, prompt, batch, scale)

    @property
    def ways(self) -> dict[str, Callable[[], Tensor]]:
        ways = {
            "unimm": self.ours,
            "unimm, 8 tokens ahead": lambda: self.ours(parallel_tokens=8),
            "unimm, auto ahead": lambda: self.ours(parallel_tokens="auto"),
            "unimm, the model's own forward": self.ours_by_host,
            "transformers generate": self.stock,
            "transformers generate, static cache": lambda: self.stock(cache_implementation="static"),
            "plain loop": self.loop,
        }
        if self.model.device.type == "cuda":
            ways["unimm, compiled"] = lambda: self.ours(compile=True)
        return ways

    def ours(self, **options: Any) -> Tensor:
        drawn: Tensor = self.model.generate(
            self.prompt,
            generation_mode="image",
            num_return_sequences=self.batch,
            do_sample=True,
            seed=0,
            guidance_scale=self.scale,
            **options,
        )
        return drawn

    def ours_by_host(self) -> Tensor:
        with patch.object(decoding, "is_plain", lambda model: False):
            return self.ours()

    def stock(self, **options: Any) -> Tensor:
        length = self.model.num_image_tokens
        if self.scale > 1:
            negative = torch.tensor([self.model.config.null_prompt], device=self.prompt.device)
            options |= {"guidance_scale": self.scale, "negative_prompt_ids": negative.expand(self.batch, -1)}
        drawn: Tensor = self.alone.generate(
            self.prompt.expand(self.batch, -1),
            attention_mask=torch.ones_like(self.prompt).expand(self.batch, -1),
            do_sample=True,
            top_k=0,
            max_new_tokens=length,
            min_new_tokens=length,
            disable_compile=self.model.device.type == "cpu",
            pad_token_id=0,
            logits_processor=LogitsProcessorList([_ImageIdsOnly(self.model.config.image_vocab_start)]),
            **options,
        )
        return drawn[:, self.prompt.shape[1] :]

    @torch.no_grad()
    def loop(self) -> Tensor:
        """Generate as most image models do: conditional and unconditional rows in one forward, dynamic cache."""
        base, batch = self.model.config.image_vocab_start, self.batch
        ids = self.prompt.expand(batch, -1)
        if self.scale > 1:
            null = torch.tensor(self.model.config.null_prompt, device=ids.device)
            other = torch.full_like(self.prompt, int(null[-1]))
            other[0, -len(null) :] = null
            ids = torch.cat([ids, other.expand(batch, -1)])
        mask = torch.ones_like(ids)
        if self.scale > 1:
            mask[batch:, : ids.shape[1] - len(null)] = 0
        cache, drawn = DynamicCache(config=self.alone.config), []
        for _ in range(self.model.num_image_tokens):
            positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
            output = self.alone(
                ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1
            )
            logits = output.logits[:, -1, base:].float()
            if self.scale > 1:
                given, other_logits = logits.chunk(2)
                logits = other_logits + self.scale * (given - other_logits)
            chosen = base + logits.softmax(-1).multinomial(1)
            drawn.append(chosen)
            ids = chosen.repeat(2, 1) if self.scale > 1 else chosen
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        return torch.cat(drawn, dim=1)


def compare(rivals: Rivals, repeats: int, only: str = "") -> dict[str, dict[str, float]]:
    """Return medians over `repeats` rounds for each way whose name contains `only`, after one warm-up round."""
    ways = {name: way for name, way in rivals.ways.items() if only in name}
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    tokens = rivals.model.num_image_tokens
    for _ in range(repeats + 1):
        for name, way in ways.items():
            wall, processor = time.perf_counter(), time.process_time()
            drawn = way()
            if drawn.is_cuda:
                torch.cuda.synchronize()
            spent[name].append((time.perf_counter() - wall, time.process_time() - processor))
            assert drawn.shape == (rivals.batch, tokens)
    found = {}
    for name, turns in spent.items():
        seconds, processor_seconds = (statistics.median(column) for column in zip(*turns[1:], strict=True))
        found[name] = {
            "seconds": seconds,
            "processor_seconds": processor_seconds,
            "tokens_per_second": rivals.batch * tokens / seconds,
            "ms_per_step": 1000 * seconds / tokens,
            "images_per_second": rivals.batch / seconds,
        }
    return found


def bandwidth(device: torch.device, megabytes: int = 256) -> float:
    """Measure the device's memory read bandwidth in bytes per second: the best of five sums over a large tensor."""
    large, best = torch.ones(megabytes << 18, device=device), float("inf")
    for _ in range(5):
        start = time.perf_counter()
        large.sum().item()
        best = min(best, time.perf_counter() - start)
    return large.numel() * 4 / best


def bytes_per_step(model: Any, batch: int, guided: bool, prompt_tokens: int) -> float:
    """Return the bytes of weights and (averaged over an image) of keys and values that one step must read."""
    text, config = model.model.language_model, model.config.get_text_config()
    size = model.get_output_embeddings().weight.element_size()
    layers = sum(p.numel() for name, p in text.named_parameters() if "embed_tokens" not in name)
    head = model.config.codebook_size * config.hidden_size
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * width
    rows = batch * (2 if guided else 1)
    return float(size * (layers + head + rows * token * (prompt_tokens + model.num_image_tokens / 2)))


def built(arguments: dict[str, Any]) -> tuple[Any, Any, str]:
    """Return (model, processor, description)."""
    if arguments["model"] is not None:
        from unimm.mllm import load

        name = arguments["model"]
        return *load(None if name == "default" else name), name
    if arguments["width"] % 128 or round(arguments["image_tokens"] ** 0.5) ** 2 != arguments["image_tokens"]:
        raise UserError(
            f"--width is {arguments['width']} and --image-tokens {arguments['image_tokens']}: give a multiple of 128 "
            "and a square number."
        )
    torch.manual_seed(0)
    sizes = {name: arguments[name] for name in ("width", "layers", "codes", "image_tokens")}
    model, processor = random_model(**sizes, dtype=getattr(torch, arguments["dtype"]))
    millions = sum(p.numel() for p in model.model.language_model.parameters()) / 1e6
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device), processor, f"random Qwen3, {millions:.1f} million weights"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help='a unified model, "default" for the embedded one; without: a random one')
    for name, default in (("width", 512), ("layers", 7), ("codes", 16384), ("image-tokens", 256)):
        parser.add_argument(f"--{name}", type=int, default=default, help="of the random model, default %(default)s")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default %(default)s")
    parser.add_argument("--batches", default="1,8", help="images at once, default %(default)s")
    parser.add_argument("--scales", default="1,5", help="guidance scales, default %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="default %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="default %(default)s")
    parser.add_argument("--only", default="", help="the ways whose name holds this")
    parser.add_argument("--json", metavar="FILE", help="write the result, - for standard output")
    arguments = vars(parser.parse_args(argv))
    report = Report(arguments.pop("json"))
    torch.set_num_threads(arguments["threads"])
    model, processor, name = built(arguments)
    rate = bandwidth(model.device)
    card = torch.cuda.get_device_name() if model.device.type == "cuda" else "CPU"
    report.say(f"{name}, {model.num_image_tokens} image tokens, {model.dtype}, {card}, reads {rate / 1e9:.1f} GB/s")
    found = []
    for scale in (float(each) for each in arguments["scales"].split(",")):
        for batch in (int(each) for each in arguments["batches"].split(",")):
            rivals = Rivals.of(model, processor, batch, scale)
            needed = bytes_per_step(model, batch, scale > 1, rivals.prompt.shape[1])
            report.say(f"\nscale {scale:g}, {batch} at once{'tokens/s':>34}{'ms/step':>10}{'cpu s':>8}{'bound':>8}")
            for way, row in compare(rivals, arguments["repeats"], arguments["only"]).items():
                row["bound"] = needed / rate / (row["seconds"] / model.num_image_tokens)
                report.say(
                    f"{way:<44}{row['tokens_per_second']:>10.1f}{row['ms_per_step']:>10.2f}"
                    f"{row['processor_seconds']:>8.2f}{row['bound']:>8.2f}"
                )
                found.append({"scale": scale, "batch": batch, "way": way, **row})
            report.add(generation=found, model=name, prompt=PROMPT, bandwidth=rate, device=card, commit=git_commit())
            report.write()  # a run that is killed leaves what it has


if __name__ == "__main__":
    sys.exit(run_main(main, name="bench_generation"))

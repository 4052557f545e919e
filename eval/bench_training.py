"""Benchmark training steps on synthetic images: time by part, images and tokens per second, and MFU.

    python eval/bench_training.py --size shapes --json runs/bench_training.json
    python eval/bench_training.py --size paper --what stage1,t2i_ids --batch-size 64 --precision bf16   # on a GPU

Measured are stage 1 and stage 2 of VQRAE (stage 2 with its GAN; at size "paper" both with randomly initialized LPIPS
and ConvNeXt-S) and text-to-image training of a language model, from images ("t2i") and from ids made before
("t2i_ids", as `recipes/encode.py` makes them), each plain, with or without TF32 in float32 products and convolutions
(plain: in convolutions alone, torch's default), with gradient checkpointing, and compiled. "paper" is
VQRAE-SigLIP2-256, and Qwen3-0.6B with the 1024 tokens of a 512 px image. MFU (model FLOPs utilization) is reported if
the device's peak is known; `--profile` adds the slowest operators and how often the host waits for the device.
"""

import argparse
import gc
import sys
import tempfile
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from torch import nn
from torch.utils.data import Dataset
from transformers import Qwen3Config, Qwen3ForCausalLM

from eval.bench_real_size import QWEN3_0_6B, tokenizer_config
from eval.step_clock import PROFILED, WARM, Split, split_host_step, split_tokenizer_step
from unimm.data.conversations import message, shapes_corpus
from unimm.data.text.collators import FlowCollator
from unimm.data.text_to_image import drawing
from unimm.errors import UserError, run_main
from unimm.mllm import attach
from unimm.networks.perceptual import LPIPS, ConvNeXt
from unimm.runs.provenance import git_commit
from unimm.runs.report import Report
from unimm.tokenizer import VQRAE, VQRAEConfig
from unimm.tokenizer.published import PUBLISHED
from unimm.training.language_model.small_model import CHAT_TOKENS, new_language_model
from unimm.training.language_model.text_tokenizer import train_text_tokenizer
from unimm.training.language_model.trainer import HostTrainer, learning_blocks
from unimm.training.loop.arguments import HostTrainingArguments, TokenizerTrainingConfig
from unimm.training.loop.throughput import peak_flops
from unimm.training.tokenizer.objective import GANConfig, ObjectiveConfig, PerceptualConfig
from unimm.training.tokenizer.perceptual import PerceptualLoss
from unimm.training.tokenizer.trainer import TokenizerTrainer

WHATS = ("stage1", "stage2", "t2i", "t2i_ids")
WAYS = ("float32", "plain", "tf32", "checkpointed", "compiled")
FLOW = "drawing"


@dataclass(frozen=True)
class Size:
    """The models of one size.

    Args:
        tokenizer: the tokenizer that stages 1 and 2 train.
        drawn: the tokenizer of text-to-image training.
        llm: configuration fields of the Qwen3.
        pretrained: whether the perceptual loss uses the paper's networks (LPIPS, ConvNeXt-S).
    """

    tokenizer: VQRAEConfig
    drawn: VQRAEConfig
    llm: dict[str, Any]
    pretrained: bool


def small(side: int, patch: int, width: int, layers: int, codes: int) -> VQRAEConfig:
    encoder = {"model_type": "siglip_vision_model", "hidden_size": width, "intermediate_size": 4 * width}
    encoder |= {"num_hidden_layers": layers, "num_attention_heads": 4, "image_size": side, "patch_size": patch}
    return VQRAEConfig(encoder_config=encoder, codebook_size=codes, codebook_dim=width)


def size_of(name: str) -> Size:
    if name == "paper":
        first, second = (tokenizer_config(PUBLISHED[f"siglip2-so400m-p16-{side}"]) for side in (256, 512))
        return Size(first, second, QWEN3_0_6B, pretrained=True)
    width, layers = (32, 2) if name == "debug" else (256, 6)
    llm = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": 3 * width, "num_attention_heads": 4}
    llm |= {"num_key_value_heads": 4, "head_dim": width // 4, "tie_word_embeddings": True}
    tokenizer = small(64, 16, 32, 2, 32) if name == "debug" else small(64, 8, 128, 6, 512)
    return Size(tokenizer, tokenizer, llm, pretrained=False)


class Noise(Dataset):
    """A dataset of random images seeded by their index, each also as a text-to-image sample; with `ids`, samples are
    random ids of that tokenizer instead of images."""

    def __init__(self, side: int, length: int, ids: VQRAEConfig | None = None) -> None:
        self.side, self.length, self.ids = side, length, ids

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        random, sample = np.random.default_rng(index), {"flow": FLOW, "kind": FLOW, "index": index}
        prompt = f"image number {index}"
        if self.ids is not None:
            ids = random.integers(0, self.ids.codebook_size, self.ids.num_image_tokens)
            return sample | {
                "messages": [message("user", prompt), {"role": "assistant", "content": [{"type": "image", "ids": ids}]}]
            }
        image = Image.fromarray(random.integers(0, 256, (self.side, self.side, 3), dtype=np.uint8))
        return sample | {"image": image, "messages": drawing(prompt, image)}


def tokenizer_split(size: Size, stage: int, way: str, args: argparse.Namespace, folder: str) -> Split:
    AcceleratorState._reset_state()  # accelerate keeps the precision of the previous run otherwise
    with torch.device(device()):  # random numbers for a billion weights come quicker from a GPU
        tokenizer = VQRAE(size.tokenizer)
    config = TokenizerTrainingConfig(
        folder, stage=1 if stage == 1 else 2, steps=10_000, batch_size=args.batch_size, num_workers=args.workers,
        mixed_precision=args.precision,
    )  # fmt: skip
    gan = GANConfig(start=0) if stage == 2 else GANConfig()
    images = Noise(size.tokenizer.image_size, args.batch_size * (WARM + 3 * args.steps + PROFILED + 1))
    objective = ObjectiveConfig(perceptual=PerceptualConfig(kind="none"), gan=gan)
    trainer = TokenizerTrainer(tokenizer, images, config, objective)
    if size.pretrained:
        networks = {"lpips": (1.0, LPIPS()), "convnext_s": (0.1, ConvNeXt())}
        trainer.objective.perceptual = PerceptualLoss(networks).requires_grad_(False).eval().to(tokenizer.device)
    if way == "checkpointed":
        tokenizer.gradient_checkpointing_enable()
    if way == "compiled":
        compile_blocks(tokenizer.encoder, tokenizer.decoder)
        tokenizer.pixel_head.compile()
    return split_tokenizer_step(trainer, args.steps, profile=args.profile)


def compile_blocks(*parts: nn.Module) -> None:
    """Compile every block of these transformers: alike as they are, one compilation serves them all."""
    lists = [m for part in parts for m in part.modules() if isinstance(m, nn.ModuleList)]
    for block in (block for blocks in lists for block in blocks):
        block.compile()


def device() -> torch.device:
    """Return the GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def drawing_split(size: Size, ids: bool, way: str, args: argparse.Namespace, folder: str) -> Split:
    texts = train_text_tokenizer(shapes_corpus(200, 0), 600, CHAT_TOKENS)
    vocabulary = "vocab_size" in size.llm
    with torch.device(device()):
        llm = Qwen3ForCausalLM(Qwen3Config(**size.llm)) if vocabulary else new_language_model(size.llm, texts)
        tokenizer = VQRAE(size.drawn)
    model, processor = attach(llm, tokenizer, texts, attn_implementation="sdpa")
    steps = WARM + 2 * args.steps + (PROFILED if args.profile else 0)
    arguments = HostTrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=args.batch_size, report_to=[],
        bf16=args.precision == "bf16", dataloader_num_workers=args.workers, disable_tqdm=True,
        save_strategy="no", logging_strategy="no",
    )  # fmt: skip
    if way == "checkpointed":
        model.gradient_checkpointing_enable()
    trainer = HostTrainer(
        model, arguments, processor=processor, data_collator=FlowCollator(processor),
        train_dataset=Noise(size.drawn.image_size, args.batch_size * steps, size.drawn if ids else None),
        flow_weights={FLOW: 1.0},
    )  # fmt: skip
    if way == "compiled":
        for block in learning_blocks(model):
            block.compile(dynamic=True)
    return split_host_step(trainer, args.steps, profile=args.profile)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("debug", "shapes", "paper"), default="debug")
    parser.add_argument("--what", default="stage1,stage2,t2i", help=f"of {', '.join(WHATS)}, by commas")
    parser.add_argument("--ways", default=",".join(WAYS), help="default %(default)s")
    for name, value in {"batch-size": 4, "steps": 5, "workers": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=value, help="default %(default)s")
    parser.add_argument("--precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--profile", action="store_true", help="record the slowest operators of every run")
    parser.add_argument("--peak-tflops", type=float, help="of the device, where it is not in the table")
    parser.add_argument("--json", metavar="FILE", help="write the figures there, - for standard output")
    args = parser.parse_args(argv)
    whats, ways = args.what.split(","), args.ways.split(",")
    if unknown := sorted(({*whats} - {*WHATS}) | ({*ways} - {*WAYS})):
        raise UserError(
            f"There is no {unknown[0]!r}: --what is of {', '.join(WHATS)}, and --ways of {', '.join(WAYS)}."
        )
    report, size = Report(args.json), size_of(args.size)
    peak = args.peak_tflops * 1e12 if args.peak_tflops else peak_flops(device())
    settings = {name: value for name, value in vars(args).items() if name != "json"}
    report.add(settings=settings, device=str(device()), peak_tflops=peak and peak / 1e12, commit=git_commit())
    for what in whats:
        for way in ways:
            torch.set_float32_matmul_precision("high" if way == "tf32" else "highest")
            torch.backends.cudnn.allow_tf32 = way != "float32"  # of convolutions; torch's default is True
            with tempfile.TemporaryDirectory() as folder:
                if what.startswith("t2i"):
                    split = drawing_split(size, what == "t2i_ids", way, args, folder)
                else:
                    split = tokenizer_split(size, int(what[-1]), way, args, folder)
            say(report, f"{what} {way}", split, peak)
            report.write()  # a run that is killed leaves what it has
            free(device())


def free(place: torch.device) -> None:
    """Give the memory of the last run back, and start its peak anew."""
    gc.collect()
    if place.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(place)


def say(report: Report, name: str, split: Split, peak: float | None) -> None:
    mfu = split.mfu(peak)
    figures = {"images_per_second": split.images_per_second, "tokens_per_second": split.tokens_per_second, "mfu": mfu}
    figures |= {"data_ratio": split.data_ratio, "peak_memory_gib": split.peak_memory_gib}
    parts = dict(sorted(split.parts.items(), key=lambda item: -item[1]))
    figures |= split.profile
    report.add(**{name: {"step_seconds": split.step_seconds, "parts": parts, **figures}})
    used = "unknown peak" if mfu is None else f"MFU {mfu:.1%}"
    report.say(
        f"{name}: {split.step_seconds:.3f} s a step, {split.images_per_second:.1f} images/s, "
        f"{split.tokens_per_second:.0f} tokens/s, {used}, peak memory {split.peak_memory_gib:.2f} GiB"
    )
    total = sum(parts.values())
    report.say("  " + ", ".join(f"{part} {seconds / total:.0%}" for part, seconds in parts.items()))
    slow = "" if split.data_ratio >= 3 else ": TOO SLOW, below 3; raise --workers"
    report.say(f"  data come {split.data_ratio:.1f} times as fast as the steps take them{slow}")


if __name__ == "__main__":
    sys.exit(run_main(main, name="bench_training"))

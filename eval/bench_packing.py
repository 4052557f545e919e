"""Benchmark text-to-image training with padded and with packed batches, on captions of many lengths.

    python eval/bench_packing.py --json runs/bench_packing.json
    python eval/bench_packing.py --image-tokens 256 --pack-length 1024

Captions are those of $UNIMM_DATA/data/captions (Flickr8k, five per image): sample n joins 1 to 5 of them, short and
long as in re-captioned data sets. Every batch is trained on both ways, interleaved, so that a busy machine slows both.
Tokens per second count tokens that are not padding. The language model is a randomly initialized Qwen3.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from unimm.data.sources.storage import data_path
from unimm.data.sources.tables import parquet_images
from unimm.data.text.collators import FlowCollator
from unimm.data.text_to_image import drawing
from unimm.errors import UserError, run_main
from unimm.mllm import attach
from unimm.runs.report import Report
from unimm.tokenizer import VQRAE, VQRAEConfig
from unimm.training.language_model.small_model import CHAT_TOKENS, new_language_model
from unimm.training.language_model.text_tokenizer import train_text_tokenizer
from unimm.training.language_model.trainer import HostTrainer
from unimm.training.loop.arguments import HostTrainingArguments

FLOW = "drawing"


def samples_of(source: str, count: int) -> list[dict[str, Any]]:
    """Return text-to-image samples of a gray image, so that only lengths matter, with captions of 1 to 5 sentences."""
    captions = parquet_images([data_path(source)]).table["captions"]
    if len(captions) < count:
        raise UserError(f"{source} holds {len(captions)} rows and {count} are asked for: give fewer --batches.")
    grey = Image.new("RGB", (8, 8), "grey")
    prompts = [" ".join(captions[n][: 1 + n % len(captions[n])]) for n in range(count)]
    return [{"flow": FLOW, "kind": FLOW, "index": n, "messages": drawing(p, grey)} for n, p in enumerate(prompts)]


def small_host(samples: Sequence[dict[str, Any]], image_tokens: int, width: int, layers: int) -> Any:
    """Build (model, processor) with `image_tokens` tokens per image and a text tokenizer trained on the captions."""
    texts = train_text_tokenizer((s["messages"][0]["content"][0]["text"] for s in samples), 2000, CHAT_TOKENS)
    heads = {"num_attention_heads": width // 64, "num_key_value_heads": width // 64, "head_dim": 64}
    llm = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": 3 * width, **heads}
    side = round(image_tokens**0.5)
    encoder = {"model_type": "siglip_vision_model", "hidden_size": 16, "num_hidden_layers": 1, "patch_size": 4}
    encoder |= {"intermediate_size": 32, "num_attention_heads": 2, "image_size": 4 * side}
    image_tokenizer = VQRAE(VQRAEConfig(encoder_config=encoder, codebook_size=1024, codebook_dim=8))
    language_model = new_language_model(llm | {"tie_word_embeddings": True}, texts)
    return attach(language_model, image_tokenizer, texts, attn_implementation="sdpa")


def measure(trainer: HostTrainer, batch: dict[str, dict[str, torch.Tensor]]) -> float:
    """Return the seconds of one forward and backward pass."""
    trainer.model.zero_grad()
    start = time.perf_counter()
    trainer.compute_loss(trainer.model, batch).backward()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="$UNIMM_DATA/data/captions/train.parquet")
    for name, value in {"image-tokens": 64, "pack-length": 256, "batch-size": 32, "batches": 6}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--width", type=int, default=384, help="of the language model, a multiple of 64")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--json", metavar="FILE", help="write the figures there, - for standard output")
    args = parser.parse_args()
    report = Report(args.json)
    samples = samples_of(args.source, args.batch_size * (args.batches + 1))
    model, processor = small_host(samples, args.image_tokens, args.width, args.layers)
    collators = {"padded": FlowCollator(processor), "packed": FlowCollator(processor, pack_length=args.pack_length)}
    seconds: dict[str, list[float]] = {"padded": [], "packed": []}
    places = dict.fromkeys(seconds, 0)
    tokens: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        arguments = HostTrainingArguments(folder, max_steps=1, pack_length=args.pack_length, report_to="none")
        trainer = HostTrainer(
            model, arguments, processor=processor, data_collator=collators["padded"], train_dataset=samples,
            flow_weights={FLOW: 1.0},
        )  # fmt: skip
        model.train()
        for k in range(args.batches + 1):  # the first is a warm-up
            chosen = samples[k * args.batch_size : (k + 1) * args.batch_size]
            batches = {way: collate(chosen) for way, collate in collators.items()}
            for way in sorted(batches, reverse=k % 2 == 0):
                seconds[way].append(measure(trainer, batches[way]))
                places[way] += batches[way][FLOW]["input_ids"].numel() if k else 0
            tokens.append(int(batches["padded"][FLOW]["attention_mask"].sum()))
    rates = {way: sum(tokens[1:]) / sum(spent[1:]) for way, spent in seconds.items()}
    ratios = [a / b for a, b in zip(seconds["padded"][1:], seconds["packed"][1:], strict=True)]
    lengths = collators["padded"](samples)[FLOW]["attention_mask"].sum(1).float()
    report.add(
        settings={name: value for name, value in vars(args).items() if name != "json"},
        sample_tokens={"least": int(lengths.min()), "median": int(lengths.median()), "most": int(lengths.max())},
        tokens_per_second=rates,
        share_of_padding={way: 1 - sum(tokens[1:]) / count for way, count in places.items()},
        ratio={"overall": rates["packed"] / rates["padded"], "median of batches": statistics.median(ratios)},
    )
    for name, value in report.content.items():
        report.say(f"{name}: {value}")
    report.write()


if __name__ == "__main__":
    sys.exit(run_main(main, name="bench_packing"))

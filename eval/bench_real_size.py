"""Count the parameters of full-size models, and run Qwen3-0.6B with a full-size image tokenizer.

    python eval/bench_real_size.py --json real_size.json
    python eval/bench_real_size.py --only table

The table has one row for VQRAE on each published encoder, for its siblings and for each class-conditional GPT, counted
on the meta device. The run attaches a tokenizer to the LLM with random weights of the published shapes (about 10 GiB at
its peak, a few minutes on two cores) and prints the seconds and the peak resident memory after each step: times and
memory are real, the outputs are noise. Nothing is downloaded.
"""

import argparse
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config
from transformers.utils import logging

from unimm.bfloat16 import automatic_dtype
from unimm.class_conditional import SIZES, ClassConditionalConfig, ClassConditionalGPT
from unimm.errors import UserError, run_main
from unimm.mllm import attach, load
from unimm.runs.provenance import git_commit
from unimm.runs.report import Report
from unimm.saving import save_whole
from unimm.testing.hosts import text_tokenizer
from unimm.tokenizer import IDEAL, VQRAE, ImageTokenizer, VFMTok, VQRAEConfig
from unimm.tokenizer.published import PUBLISHED, PublishedEncoder

QWEN3_0_6B: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
}
"""https://huggingface.co/Qwen/Qwen3-0.6B/blob/main/config.json"""

LLAMAGEN = {"B": "111M", "L": "343M", "XL": "775M", "XXL": "1.4B", "2B": "2B", "3B": "3.1B"}
"""The weights that LlamaGen (arXiv 2406.06525), and VFMTok for 2B, give the sizes; tokenizers have no such total."""


def tokenizer_config(encoder: PublishedEncoder) -> VQRAEConfig:
    """Return the configuration of VQRAE on the encoder with the paper's codebook (16384 x 1536)."""
    mean, std = encoder.normalization
    return VQRAEConfig(
        encoder_config=encoder.vision_config(),
        feature_layer=encoder.feature_layer,
        image_mean=list(mean),
        image_std=list(std),
    )


def parameter_table() -> list[dict[str, Any]]:
    """Return a row for VQRAE on each published encoder and for each published sibling: tokens per image and parameters
    of the tokenizer's parts, counted on the meta device. C of the codebook is counted although it is not trained."""
    with torch.device("meta"):
        siblings = {
            "VFMTok, DINOv2-L 336": VFMTok(VFMTok.config_class()),
            "IDEAL, SigLIP2-L 384": IDEAL(IDEAL.config_class()),
        }
        tokenizers = {name: VQRAE(tokenizer_config(encoder)) for name, encoder in PUBLISHED.items()} | siblings
    return [{"name": name, **_parts(tokenizer)} for name, tokenizer in tokenizers.items()]


def gpt_table() -> list[dict[str, Any]]:
    """Return a row for each size of the class-conditional GPT: its parameters here and as published by LlamaGen."""
    rows = []
    for size in SIZES:
        with torch.device("meta"):
            model = ClassConditionalGPT(ClassConditionalConfig.of_size(size))
        rows.append({"name": size, "all": sum(p.numel() for p in model.parameters()), "published": LLAMAGEN[size]})
    return rows


def _parts(tokenizer: ImageTokenizer) -> dict[str, int]:
    parts = {part: _size(getattr(tokenizer, part)) for part in ("encoder", "sampler", "quantizer", "decoder")}
    parts["decoder"] += _size(tokenizer.pixel_head)
    return {"tokens": tokenizer.config.num_image_tokens, **parts, "all": sum(parts.values())}


def _size(module: nn.Module) -> int:
    return sum(tensor.numel() for tensor in module.state_dict().values())


def run_real_size(encoder: str = "internvit-300m-448", *, seed: int = 0) -> dict[str, Any]:
    """Attach VQRAE on `encoder` to Qwen3-0.6B (bfloat16 if the CPU multiplies it fast), save, reload, and generate a
    few text and image tokens.

    Returns:
        Seconds of each step, parameter counts, and the peak resident memory in GiB after each step.
    """
    dtype = automatic_dtype(torch.device("cpu"))
    result: dict[str, Any] = {"host": "Qwen3-0.6B", "encoder": encoder, "dtype": str(dtype).removeprefix("torch.")}
    result |= {"seconds": {}, "peak_gib": {}}

    @contextmanager
    def step(name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        result["seconds"][name] = round(time.perf_counter() - start, 2)
        result["peak_gib"][name] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)

    torch.manual_seed(seed)
    with step("build"):
        host = _random_host(dtype)
        image_tokenizer = VQRAE(tokenizer_config(PUBLISHED[encoder])).eval()
    with step("attach"):
        model, processor = attach(host, image_tokenizer, text_tokenizer(()))
    result["weights"] = sum(p.numel() for p in model.parameters()) + image_tokenizer.quantizer.codebook.numel()
    del host, image_tokenizer
    with tempfile.TemporaryDirectory() as folder:
        with step("save"):
            save_whole(Path(folder), model, processor)
        result["gib_on_disk"] = round(sum(f.stat().st_size for f in Path(folder).iterdir()) / 2**30, 2)
        expected = _answer(model, processor, 1)
        del model
        with step("reload"):
            model, processor = load(folder, device="cpu", dtype=dtype)
    with step("8 tokens of an answer to an image"):
        answer = _answer(model, processor, 8)
    result["same_after_reload"] = answer[:1] == expected
    with step("8 image ids"):
        ids = _draw(model, processor, 8)
    result["image_ids"] = len(ids)
    with step("decode an image"):
        pixels = model.image_tokenizer.decode(torch.randint(0, model.config.codebook_size, (1, model.num_image_tokens)))
    result["image"] = list(pixels.shape)
    return result


def _random_host(dtype: torch.dtype) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(Qwen3Config(**QWEN3_0_6B), dtype=dtype).eval()


def _answer(model: Any, processor: Any, tokens: int) -> list[int]:
    content = [{"type": "image", "image": Image.new("RGB", (640, 480), "red")}, {"type": "text", "text": "what is it?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    out = model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return out[0, inputs["input_ids"].shape[1] :].tolist()


@torch.no_grad()
def _draw(model: Any, processor: Any, tokens: int) -> list[int]:
    """Generate the first `tokens` ids of an image, one forward each (a full image has `num_image_tokens`)."""
    ids = processor(text=[processor.drawing_prompt("a red circle")], return_tensors="pt")["input_ids"]
    cache, drawn = None, list[int]()
    for _ in range(tokens):
        out = model(input_ids=ids, past_key_values=cache, use_cache=True, vocabulary="image", logits_to_keep=1)
        cache, ids = out.past_key_values, model.config.image_vocab_start + out.logits[:, -1].argmax(-1, keepdim=True)
        drawn.append(int(ids))
    return drawn


PARTS = ("encoder", "sampler", "quantizer", "decoder", "all")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("table", "run"))
    parser.add_argument("--encoder", default="internvit-300m-448", help="of the run; `unimm encoders` lists them")
    parser.add_argument("--json", metavar="FILE", help="write the result, - for standard output")
    arguments = parser.parse_args(argv)
    if arguments.encoder not in PUBLISHED:
        raise UserError(f"There is no encoder {arguments.encoder}; known are {', '.join(PUBLISHED)}.")
    report = Report(arguments.json)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    if arguments.only != "run":
        rows = parameter_table()
        report.add(table=rows)
        report.say(f"{'VQRAE on':<24} {'tokens':>6} {' '.join(f'{part:>9}' for part in PARTS)}   millions")
        for row in rows:
            millions = [f"{row[part] / 1e6:9.1f}" for part in PARTS]
            report.say(f"{row['name']:<24} {row['tokens']:>6} {' '.join(millions)}")
        sizes = gpt_table()
        report.add(gpt=sizes)
        for row in sizes:
            report.say(f"GPT {row['name']:<20} {row['all'] / 1e6:9.1f}   LlamaGen: {row['published']}")
    if arguments.only != "table":
        result = run_real_size(arguments.encoder)
        report.add(run=result)
        report.say(f"{result['host']} + VQRAE on {result['encoder']}: {result['weights'] / 1e6:.1f} million weights")
        for name, seconds in result["seconds"].items():
            report.say(f"{name:<36} {seconds:>7.2f} s   peak {result['peak_gib'][name]:.2f} GiB")
        report.say(
            f"on disk {result['gib_on_disk']} GiB, the same token after the reload: {result['same_after_reload']}"
        )
    report.add(commit=git_commit())
    report.write()


if __name__ == "__main__":
    sys.exit(run_main(main, name="bench_real_size"))

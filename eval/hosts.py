"""Test `attach` on every pair of a host family and an encoder family.

    python eval/hosts.py --json hosts.json
    python eval/hosts.py --hosts llava,internvl --encoders siglip_vision_model

A host is the language or multimodal model that an image tokenizer is attached to. Hosts and encoders are tiny and
random, but use the real configuration classes and the real code to save and load; the reload runs in a fresh process
that imports unimm. It takes a minute or two on two cores. `--json FILE` writes {"rows": [{host, encoder, check:
true/false, ...}], "ok": bool}; a check that could not run holds the reason instead. The exit code is 1 if one failed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import (
    PreTrainedModel,
    pipeline,
)
from transformers.utils import is_torchvision_available, logging

from unimm.errors import UserError, run_main
from unimm.mllm import attach
from unimm.mllm.answering import chat_inputs
from unimm.mllm.doctor import examine
from unimm.mllm.export import detach
from unimm.mllm.hosts.registry import HOSTS
from unimm.mllm.hosts.text_only import TEXT_HOSTS
from unimm.runs.provenance import git_commit
from unimm.runs.report import Report
from unimm.testing.hosts import ENCODER_FAMILIES, HOST_FAMILIES, ROWS, tiny_host, tiny_tokenizer

Row = dict[str, Any]

_RELOAD = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor
import unimm
equal = {}
for folder in map(Path, sys.argv[1:]):
    saved = load_file(folder / "trial.safetensors")
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    AutoProcessor.from_pretrained(folder)
    with torch.no_grad():
        logits = model(input_ids=saved["input_ids"], pixel_values=saved["pixel_values"]).logits
    equal[folder.name] = torch.equal(logits, saved["logits"])
print(json.dumps(equal))
"""


def try_pair(host_family: str, encoder: str, folder: Path) -> Row:
    """Check one pair and save the model for `reload`; each check is True, False or the reason why it did not run."""
    host, texts = tiny_host(host_family)
    image_tokenizer, own = tiny_tokenizer(host, encoder)
    row: Row = {"host": host_family, "encoder": encoder, "own_encoder": own}
    model, processor = attach(host, image_tokenizer, texts)
    row["attach"] = True
    chat = _chat(_noise(), "is there a red circle?")
    inputs = chat_inputs(model, processor, [chat])
    row |= _learning(model, inputs)
    greedy: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": [], "pad_token_id": 0}
    written = model.generate(**inputs, **greedy)
    row["text"] = written.shape[1] == inputs["input_ids"].shape[1] + 6 and not _drawn(model, written).any()
    token_ids = model.generate(**inputs, generation_mode="image", seed=3, guidance_scale=2.0, num_return_sequences=2)
    images = processor.postprocess(model.decode_image_tokens(token_ids))
    row["image"] = bool(_drawn(model, token_ids).all()) and [each.size for each in images] == [(16, 16)] * 2
    answers = pipeline("image-text-to-text", model=model, processor=processor)(text=chat, max_new_tokens=4)
    row["pipeline"] = isinstance(answers[0]["generated_text"], list | str)
    row["any_to_any"] = _any_to_any(model, processor, chat) if is_torchvision_available() else "needs torchvision"
    row["batches"] = _batches(model, processor)
    row["host_kept"] = _host_kept(model, host, own)
    row["detach"] = _detached(model, host, own or host_family in TEXT_HOSTS)
    row["doctor"] = all(finding.ok for finding in examine(model, processor))
    _save(model, processor, inputs, folder)
    return row


def reload(folders: list[Path]) -> dict[str, bool]:
    """Load the saved models in one fresh process and return {folder name: whether the logits are identical}."""
    command = [sys.executable, "-c", _RELOAD, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"The fresh process failed: {' '.join(done.stderr.split())[-400:]}")
    found: dict[str, bool] = json.loads(done.stdout.splitlines()[-1])
    return found


def try_pairs(hosts: tuple[str, ...], encoders: tuple[str, ...], folder: Path) -> Iterator[Row]:
    """Yield a row for every pair; `reload`, the last check of each, runs once for all pairs at the end."""
    pairs = [(host, encoder) for host in hosts for encoder in encoders]
    rows = {}
    for host, encoder in tqdm(pairs, unit="pair", leave=False):
        name = f"{host}-{encoder}"
        rows[name] = try_pair(host, encoder, folder / name)
    equal = reload([folder / name for name in rows])
    for name, row in rows.items():
        yield row | {"reload": equal[name]}


def _noise() -> Image.Image:
    return Image.effect_noise((20, 12), 64).convert("RGB")


def _chat(*parts: str | Image.Image) -> list[dict[str, Any]]:
    """Return a chat of one user turn with texts and images."""
    texts = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part} for part in parts
    ]
    return [{"role": "user", "content": texts}]


@torch.no_grad()
def _batches(model: Any, processor: Any) -> bool:
    """Check that text and images generated for chats with 0, 1 and 2 images do not depend on batching or order."""
    chats = [_chat(_noise(), "one"), _chat("a longer question"), _chat(_noise(), "and", _noise(), "?")]
    ways: tuple[dict[str, Any], ...] = (
        {"max_new_tokens": 6, "do_sample": False, "eos_token_id": [], "pad_token_id": 0},
        {"generation_mode": "image", "guidance_scale": 2.0},
    )

    def made(rows: list[int], options: dict[str, Any]) -> list[list[int]]:
        inputs = chat_inputs(model, processor, [chats[n] for n in rows])
        drawing = "generation_mode" in options
        seeds = {"seed": rows} if drawing else {}
        out = model.generate(**inputs, **options, **seeds)
        return (out if drawing else out[:, inputs["input_ids"].shape[1] :]).tolist()

    return all(
        made([2, 0, 1], options) == [made([n], options)[0] for n in (2, 0, 1)]
        and made([0, 1, 2], options) == [made([n], options)[0] for n in (0, 1, 2)]
        for options in ways
    )


def _learning(model: Any, inputs: dict[str, torch.Tensor]) -> Row:
    """Check that a loss over text and image ids is finite and reaches tower, projector and output rows."""
    base = model.config.image_vocab_start
    labels = torch.cat([inputs["input_ids"], torch.tensor([[base, base + 31]])], 1)
    mask = torch.ones_like(labels)
    model.train()
    loss = model(input_ids=labels, attention_mask=mask, pixel_values=inputs["pixel_values"], labels=labels).loss
    loss.backward()
    model.eval()
    head = model.get_output_embeddings().weight.grad
    reached = {
        "tower": any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.image_tokenizer.encoder.parameters()),
        "projector": any(p.grad.abs().sum() > 0 for p in model.model.multi_modal_projector.parameters()),
        "rows": bool((head[[base, base + 31]].abs().sum(1) > 0).all()),
    }
    model.zero_grad()
    return {"loss": bool(torch.isfinite(loss)), "gradients": all(reached.values())}


def _drawn(model: Any, token_ids: torch.Tensor) -> torch.Tensor:
    return model.visual_vocabulary.contains(token_ids)


def _any_to_any(model: Any, processor: Any, chat: list[dict[str, Any]]) -> bool:
    run = pipeline("any-to-any", model=model, processor=processor)
    written = run(text=chat, max_new_tokens=4)
    drawn = run(text=chat, generation_mode="image", max_new_tokens=16)
    return bool(written[0]["generated_text"]) and drawn[0]["generated_image"].size == (16, 16)


@torch.no_grad()
def _host_kept(model: Any, host: PreTrainedModel, own: bool) -> bool:
    """Check that text logits are bit-identical to the host's, and image logits too with the host's own encoder."""
    text = torch.randint(10, 200, (3, 7))  # ids below 10 are special tokens, such as image placeholders
    same = torch.equal(model(input_ids=text).logits[..., :ROWS], host(input_ids=text).logits)
    if not own:
        return same
    return same and torch.equal(model(**_seen(host)).logits[..., :ROWS], host(**_seen(host)).logits)


@torch.no_grad()
def _seen(host: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return inputs with one image in the host's own format: in tiles if the host tiles images."""
    generator = torch.Generator().manual_seed(2)
    tiles = HOSTS[host.config.model_type].model.tiles
    shape = (1, 3, 3, 16, 16) if tiles else (1, 3, 16, 16)
    inputs = {"pixel_values": torch.randn(shape, generator=generator)}
    if tiles:
        inputs["image_sizes"] = torch.tensor([[16, 30]])
    count = len(host.get_image_features(**inputs, return_dict=True).pooler_output[0])
    placeholders = torch.full((1, count), host.config.image_token_id)
    text = torch.randint(10, 200, (1, 9), generator=generator)
    return {"input_ids": torch.cat([text[:, :3], placeholders, text[:, 3:]], 1), **inputs}


def _detached(model: Any, host: PreTrainedModel, returns: bool) -> bool:
    """Check that `detach` returns the host with an equal state, or raises if its tower was replaced."""
    try:
        again = detach(model).state_dict()
    except UserError:
        return not returns
    expected = host.state_dict()
    return returns and again.keys() == expected.keys() and all(torch.equal(again[k], v) for k, v in expected.items())


@torch.no_grad()
def _save(model: Any, processor: Any, inputs: dict[str, torch.Tensor], folder: Path) -> None:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    trial = {name: inputs[name].contiguous() for name in ("input_ids", "pixel_values")}
    logits = model(**trial).logits
    save_file({**trial, "logits": logits.contiguous()}, folder / "trial.safetensors")


LABELS = ("host", "encoder", "own_encoder")  # fields of a row that are not checks


def chosen(given: str | None, known: tuple[str, ...], option: str) -> tuple[str, ...]:
    names = known if given is None else tuple(name.strip() for name in given.split(","))
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"{option} names {', '.join(unknown)}; known are {', '.join(known)}.")
    return names


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", help=f"which of {', '.join(HOST_FAMILIES)}; default: all")
    parser.add_argument("--encoders", help=f"which of {', '.join(ENCODER_FAMILIES)}; default: all")
    parser.add_argument("--json", metavar="FILE", help="write the result, - for standard output")
    arguments = parser.parse_args(argv)
    report = Report(arguments.json)
    hosts = chosen(arguments.hosts, HOST_FAMILIES, "--hosts")
    encoders = chosen(arguments.encoders, ENCODER_FAMILIES, "--encoders")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as folder, report.timed("all"):
        rows = list(try_pairs(hosts, encoders, Path(folder)))
    for row in rows:
        checks = {name: value for name, value in row.items() if name not in LABELS}
        marks = " ".join(name if value is True else f"{name.upper()}={value}" for name, value in checks.items())
        report.say(f"{row['host']:<16} {row['encoder']:<22} {'own ' if row['own_encoder'] else '    '} {marks}")
    ok = all(value is not False for row in rows for name, value in row.items() if name not in LABELS)
    report.add(rows=rows, ok=ok, commit=git_commit())
    report.write()
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(run_main(main, name="hosts"))

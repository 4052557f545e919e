"""Ways out: the host comes back to the bit, and stock classes read and write as the unified model did."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    SiglipVisionModel,
)

from tests.mllm import tiny
from tests.mllm.test_multimodal_hosts import HOSTS, build, sentence
from unimm.errors import UserError
from unimm.mllm import attach
from unimm.mllm.export import causal_lm, detach, save_generation, stock_understanding
from unimm.mllm.hosts.registry import HOSTS as FAMILIES


def same_state(ours: torch.nn.Module, theirs: torch.nn.Module) -> bool:
    found, expected = ours.state_dict(), theirs.state_dict()
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_detached_is_the_text_host(family: str, tied: bool, tmp_path: Path) -> None:
    host = tiny.language_model(family, tied=tied)
    model, _ = attach(host, tiny.image_tokenizer(), tiny.text_tokenizer())
    model.save_pretrained(tmp_path)
    again = detach(AutoModelForImageTextToText.from_pretrained(tmp_path))
    assert type(again) is type(host) and same_state(again, host)


@pytest.mark.parametrize("name", HOSTS)
def test_detached_is_the_multimodal_host(name: str) -> None:
    host, tokenizer, image_tokenizer, merged = build(name)
    again = detach(attach(host, image_tokenizer, tokenizer)[0])
    assert type(again) is type(host) and same_state(again, host)
    input_ids, pixel_values = sentence(host, 2, merged)
    with torch.no_grad():
        inputs = {"input_ids": input_ids, "pixel_values": pixel_values}
        assert torch.equal(again(**inputs).logits, host(**inputs).logits)


def test_a_host_that_lost_its_tower_cannot_come_back() -> None:
    host, tokenizer, *_ = build("llava-clip")
    model, _ = attach(host, tiny.image_tokenizer(), tokenizer)
    with pytest.raises(UserError, match="its tower or projector was replaced"):
        detach(model)


@pytest.mark.parametrize("name", ["text", *HOSTS])
def test_a_stock_model_reads_images_with_the_same_logits(name: str, tmp_path: Path) -> None:
    if name == "text":
        merged, expected, (model, processor) = 1, LlavaForConditionalGeneration, tiny.unified(rows=304)
    else:
        host, tokenizer, image_tokenizer, merged = build(name)
        expected, (model, processor) = type(host), attach(host, image_tokenizer, tokenizer)
    stock, reader = stock_understanding(model, processor)
    stock.save_pretrained(tmp_path)
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert type(stock) is expected
    input_ids, pixel_values = sentence(model, 2, merged)
    with torch.no_grad():
        inputs = {"input_ids": input_ids, "pixel_values": pixel_values}
        rows = model.config.text_vocab_size
        assert torch.equal(stock(**inputs).logits, model(**inputs).logits[..., :rows])
    if name == "text":
        assert type(stock.model.vision_tower) is SiglipVisionModel
        reader.save_pretrained(tmp_path)
        reader = AutoProcessor.from_pretrained(tmp_path)
        assert type(reader) is LlavaProcessor
        chat = [tiny.user(tiny.image("blue"), "is there a red circle?")]
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        theirs, ours = (each.apply_chat_template(chat, **options) for each in (reader, processor))
        assert torch.equal(theirs["input_ids"], ours["input_ids"])
        torch.testing.assert_close(theirs["pixel_values"], ours["pixel_values"])


def test_features_that_no_stock_model_taps_are_refused() -> None:
    model, processor = tiny.unified()
    model.image_tokenizer.config.feature_layers = 2
    with pytest.raises(UserError, match="the sum of 2 layers, and a stock llava taps one"):
        stock_understanding(model, processor)
    model.image_tokenizer.config.apply_post_norm = True
    with pytest.raises(UserError, match="behind the encoder's final norm, where no stock llava taps them"):
        stock_understanding(model, processor)


def test_a_family_that_taps_behind_the_final_norm_refuses_features_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = tiny.unified()
    monkeypatch.setitem(FAMILIES, "llava", dataclasses.replace(FAMILIES["llava"], post_norm=True))
    with pytest.raises(UserError, match="before the encoder's final norm, where no stock llava taps them"):
        stock_understanding(model, processor)


@pytest.mark.parametrize("tied", [True, False])
def test_a_plain_causal_lm_writes_the_same_ids(tied: bool, tmp_path: Path) -> None:
    model, processor = tiny.unified(tied=tied)
    save_generation(model, processor, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(plain) is type(tiny.language_model()) and same_state(plain, causal_lm(model))
    inputs = processor(text=[processor.drawing_prompt("a red circle")], return_tensors="pt")
    expected = model.generate(**inputs, generation_mode="image", do_sample=False, guidance_scale=None)
    vocabulary = json.loads((tmp_path / "image_vocabulary.json").read_text())
    base, size = vocabulary["image_vocab_start"], vocabulary["codebook_size"]
    ids = inputs["input_ids"]
    with torch.no_grad():
        for _ in range(16):  # any engine that takes logits does this
            chosen = plain(ids).logits[:, -1, base : base + size].argmax(-1, keepdim=True) + base
            ids = torch.cat([ids, chosen], 1)
    assert torch.equal(ids[:, -16:], expected)


_ELSEWHERE = """
import sys
sys.modules["unimm"] = None  # what would import it fails
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
for kind, auto in {"reads": AutoModelForImageTextToText, "writes": AutoModelForCausalLM}.items():
    folder = f"{sys.argv[1]}/{kind}"
    trial = load_file(folder + "/trial.safetensors")
    model = auto.from_pretrained(folder).eval()
    expected = trial.pop("logits")
    with torch.no_grad():
        found = model(**trial).logits[..., : expected.shape[-1]]
    print(kind, torch.equal(found, expected))
"""


@pytest.mark.slow
def test_the_exports_load_where_unimm_cannot_be_imported(tmp_path: Path) -> None:
    """Both in one process: importing transformers takes longer than all else."""
    model, processor = tiny.unified(rows=304)
    input_ids, pixel_values = sentence(model, 2, 1)
    for kind, vocabulary in (("reads", "text"), ("writes", "all")):
        folder, trial = tmp_path / kind, {"input_ids": input_ids}
        if kind == "reads":
            trial["pixel_values"] = pixel_values
            stock_understanding(model, processor)[0].save_pretrained(folder)
        else:
            save_generation(model, processor, folder)
        with torch.no_grad():
            logits = model(**trial, vocabulary=vocabulary).logits
        if kind == "reads":
            logits = logits[..., : model.config.text_vocab_size].contiguous()
        save_file({**trial, "logits": logits}, folder / "trial.safetensors")
    done = subprocess.run([sys.executable, "-c", _ELSEWHERE, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["reads True", "writes True"], done.stderr[-600:]

"""recipes/average.py: weights between two models, and models that cannot be averaged."""

import runpy
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from tests.mllm.tiny import unified
from unimm.errors import UserError
from unimm.mllm import load
from unimm.tokenizer.vqrae import with_new_head

RECIPE = runpy.run_path(str(ROOT / "recipes" / "average.py"))


def saved(folder: Path, seed: int, *, moved: bool = False) -> Path:
    """Save a tiny model; `moved`: with other weights in its language model."""
    model, processor = unified()
    if moved:
        torch.manual_seed(seed)
        for weight in model.model.language_model.parameters():
            weight.data += torch.randn_like(weight)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_weights_lie_between_those_of_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [saved(tmp_path / "first", 0), saved(tmp_path / "second", 1, moved=True)]
    RECIPE["main"]([*map(str, folders), "--share", "0.25", "--output", str(tmp_path / "out")])
    assert "0.75 of" in capsys.readouterr().out
    first, second, out = (dict(load(each)[0].named_parameters()) for each in (*folders, tmp_path / "out"))
    for name, weight in out.items():
        expected = 0.75 * first[name].double() + 0.25 * second[name].double()
        assert (weight - expected).abs().max() < 1e-6, name
    assert any(not torch.equal(out[name], first[name]) for name in out)
    tokenizer = [name for name in out if "vision_tower" in name or "image_tokenizer" in name]
    assert tokenizer and all(torch.equal(out[name], first[name]) for name in tokenizer)


def test_the_decoder_of_another_image_tokenizer_with_the_same_ids(tmp_path: Path) -> None:
    """Models whose decoders differ are averaged, too: the image tokenizer takes no part."""
    model, processor = load(device="cpu", dtype=torch.float32)
    head = {"pixel_head": "conv", "head_channels": 32, "head_multipliers": [1, 1, 1, 1]}
    tokenizer = with_new_head(model.image_tokenizer, **head)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    processor.image_processor.save_pretrained(tmp_path / "tokenizer")
    options = ["--share", "0.5", "--image-tokenizer", str(tmp_path / "tokenizer"), "--output", str(tmp_path / "out")]
    RECIPE["main"](["default", "default", *options])
    out, default = load(tmp_path / "out")[0], load(device="cpu", dtype=torch.float32)[0]
    for name, weight in RECIPE["learned"](out).items():
        torch.testing.assert_close(weight, dict(default.named_parameters())[name])
    ids = torch.arange(64).view(1, 64)
    assert torch.equal(out.image_tokenizer.decode(ids), tokenizer.decode(ids))
    assert not torch.equal(out.image_tokenizer.decode(ids), default.image_tokenizer.decode(ids))
    RECIPE["interpolate"](out, default, 0.5)


def test_models_that_cannot_be_averaged(tmp_path: Path) -> None:
    model, _ = unified()
    with pytest.raises(UserError, match="differ in .* weights"):
        RECIPE["interpolate"](model, unified("llama")[0], 0.5)
    other, _ = unified()
    other.image_tokenizer.quantizer.codebook.data += 1
    with pytest.raises(UserError, match="other codebooks"):
        RECIPE["interpolate"](model, other, 0.5)
    for arguments, message in (
        (["default", "default", "--share", "1"], "--share is 1: give a number between 0 and 1"),
        (["default", str(tmp_path / "none"), "--share", "0.5"], "The second model"),
    ):
        with pytest.raises(UserError, match=message):
            RECIPE["main"]([*arguments, "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()

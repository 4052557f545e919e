"""recipes/average.py: weights between two models, and models that cannot be averaged."""

import runpy
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from tests.mllm.tiny import unified
from unimm.errors import UserError
from unimm.mllm import load

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

"""The whole chain by its debug configurations: vision model, tokenizer stages, conversations, drawings, publishing."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

import unimm
from unimm.config import load_config

ROOT = Path(__file__).resolve().parents[1]
CHAIN = ("vfm", "stage1", "stage2", "stage3", "sft", "t2i")
STAGES = ("stage1", "stage2", "stage3")
RECIPES = {name: "tokenizer" if name in STAGES else name for name in (*CHAIN, "publish")}
RECIPES |= {"questions": "t2i", "positions": "t2i"}  # later legs


def run(recipe: str, *arguments: str) -> int:
    argv, sys.argv = sys.argv, [f"{recipe}.py", *arguments]
    try:
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "recipes" / f"{recipe}.py"), run_name="__main__")
    finally:
        sys.argv = argv
    return int(ended.value.code or 0)


def test_the_chain_in_small(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for step in CHAIN:
        assert run(RECIPES[step], "--config", str(ROOT / "configs" / "debug" / f"{step}.yaml")) == 0
        assert (tmp_path / "runs" / "debug" / step / "model.safetensors").is_file(), step
        assert (tmp_path / "runs" / "debug" / step / "run.json").is_file(), step
    model, processor = unimm.load("runs/debug/t2i")
    chat = unimm.ChatSession(model, processor)
    (picture,) = chat.draw("a photo of a circle", seed=1)
    assert picture.size == (64, 64)
    assert isinstance(chat.ask("What do you see?", images=[picture]), str)
    published = [
        "model=runs/debug/t2i",
        "image_tokenizer=runs/debug/stage3",
        "output_dir=out",
        f"card={ROOT}/README.md",
    ]
    assert run("publish", "--config", str(ROOT / "configs/shapes/publish.yaml"), *published) == 0
    small, _ = unimm.load("out")
    polished = unimm.VQRAE.from_pretrained("runs/debug/stage3")
    weight = polished.pixel_head.projection.weight
    assert torch.equal(small.image_tokenizer.pixel_head.projection.weight, weight.half().float())


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/**/*.yaml")), ids=lambda p: "/".join(p.parts[-2:]))
def test_every_configuration_is_read_by_its_recipe(path):
    name = RECIPES[path.stem]
    classes = {
        "vfm": "VFMConfig",
        "tokenizer": "TokenizerRecipe",
        "sft": "SFTRecipe",
        "t2i": "T2IRecipe",
        "publish": "PublishRecipe",
    }
    recipe = runpy.run_path(str(ROOT / "recipes" / f"{name}.py"))
    load_config(recipe[classes[name]], path)


@pytest.mark.parametrize(
    ("step", "override"),
    [
        ("stage1", "model.encoder"),
        ("stage2", "model.init_from"),
        ("sft", "model.image_tokenizer"),
        ("t2i", "model.path"),
    ],
)
def test_a_missing_folder_is_one_sentence(step, override, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    absent = tmp_path / "absent"
    assert run(RECIPES[step], "--config", str(ROOT / f"configs/debug/{step}.yaml"), f"{override}={absent}") == 2
    assert str(absent) in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_misspelt_key_is_one_sentence(capsys):
    assert run("tokenizer", "--config", str(ROOT / "configs/shapes/stage1.yaml"), "train.stepz=3") == 2
    assert "stepz" in capsys.readouterr().err

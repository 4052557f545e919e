"""All pages: their links, paths and commands exist, their YAML is read by its recipe, their figures add up."""

import dataclasses
import os
import re
import shlex
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.launch import launch_command_parser

from tests.conftest import ROOT
from tests.docs.pages import PAGES, code_blocks, read_page, recipe_class, run_recipe, shell_commands
from unimm.cli import build_parser
from unimm.config.loading import load_config
from unimm.data.shapes.datasets import ShapesImages
from unimm.data.sources.storage import filled
from unimm.evaluation.geneval.color_votes import CLIP_ID
from unimm.evaluation.geneval.detector import DETECTOR_ID
from unimm.networks import dino, inception, perceptual
from unimm.testing.hosts import tiny_host, tiny_tokenizer
from unimm.tokenizer import ImageTokenizerProcessor

LAUNCHERS = ("accelerate", "torchrun", "python")
WRITTEN = ("my/", "runs/", "out")  # what a reader makes
COMMANDS = [(name, words) for name in PAGES for words in shell_commands(name)]
FRAGMENTS = [(name, block) for name in PAGES for block in code_blocks(name, "yaml") if block.startswith("# recipes/")]


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", read_page(name)):
        assert (PAGES[name].parent / target).exists(), target


@pytest.mark.parametrize("name", [name for name in PAGES if name != "log.md"])
def test_paths_in_the_text_exist(name: str) -> None:
    for path in re.findall(r"`((?:unimm|recipes|eval|configs|docs|tests)/[\w./-]+)`", read_page(name)):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize(("name", "words"), COMMANDS, ids=[f"{name}:{shlex.join(w)[:60]}" for name, w in COMMANDS])
def test_commands_exist(name: str, words: list[str]) -> None:
    if words[0] == "unimm":
        build_parser().parse_args(words[1:])
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    elif words[0] == "accelerate":
        arguments = launch_command_parser().parse_args(words[2:])
        assert arguments.training_script.startswith("recipes/")
    else:
        assert words[0] in (*LAUNCHERS, "export", "serve", "tensorboard")
    for word in words:
        if word.endswith((".py", ".yaml")) and not word.startswith(WRITTEN):
            assert (ROOT / word).is_file(), word


@pytest.mark.parametrize(("name", "block"), FRAGMENTS, ids=[f"{n}:{b.splitlines()[0]}" for n, b in FRAGMENTS])
def test_yaml_is_read_by_its_recipe(name: str, block: str, tmp_path: Path) -> None:
    """A block without `model` is a part of a file: a debug configuration is its base."""
    recipe = block.splitlines()[0].removeprefix("# recipes/").removesuffix(".py")
    debug = "stage1" if recipe == "tokenizer" else recipe
    base = "" if re.search("^model:", block, flags=re.MULTILINE) else f"base: {ROOT}/configs/debug/{debug}.yaml\n"
    (tmp_path / "file.yaml").write_text(base + block, encoding="utf-8")
    load_config(recipe_class(recipe), tmp_path / "file.yaml")


def test_fragments_are_found() -> None:
    assert {block.splitlines()[0] for _, block in FRAGMENTS} >= {"# recipes/encode.py", "# recipes/t2i.py"}


# ---- data.md ----


def test_the_encode_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/data.md's block and the full-size configuration, on two small tar shards and a tiny tokenizer."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UNIMM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("UNIMM_DATA", str(tmp_path))
    tokenizer, _ = tiny_tokenizer(tiny_host("qwen3")[0], "siglip_vision_model")
    tokenizer.save_pretrained("tokenizer")
    ImageTokenizerProcessor.for_tokenizer(tokenizer.config).save_pretrained("tokenizer")
    images = ShapesImages(8, seed=3)
    (tmp_path / "blip3o").mkdir()
    for shard in range(2):
        with tarfile.open(tmp_path / "blip3o" / f"{shard:05}.tar", "w") as tar:
            for k in range(4):
                row, data = images[4 * shard + k], BytesIO()
                row["image"].resize((256, 256)).save(data, "png")
                for suffix, content in (("png", data.getvalue()), ("txt", row["text"].encode())):
                    info = tarfile.TarInfo(f"{k:06}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, BytesIO(content))
    (block,) = (block for name, block in FRAGMENTS if name == "data.md" and block.startswith("# recipes/encode.py"))
    (tmp_path / "example.yaml").write_text(block, encoding="utf-8")
    load_config(recipe_class("encode"), tmp_path / "example.yaml")  # complete as it stands
    tiny = ["model.image_tokenizer=tokenizer", "data.num_workers=0", "data.batch_size=4"]
    for config, more in (
        (tmp_path / "example.yaml", [f"data.source={tmp_path}/blip3o/{{00000..00001}}.tar", "output_dir=one"]),
        (ROOT / "configs/encode/vqrae_internvit_448.yaml", ["output_dir=two"]),
    ):
        assert run_recipe(ROOT / "recipes" / "encode.py", ["--config", str(config), *tiny, *more]) == 0
    assert (tmp_path / "one/manifest.json").is_file() and (tmp_path / "two/manifest.json").is_file()


# ---- weights.md ----


def test_every_weight_file_is_on_the_page() -> None:
    text = read_page("weights.md")
    asked = (perceptual.GET_VGG16, perceptual.GET_HEADS, perceptual.GET_CONVNEXT, dino.GET, inception.GET_INCEPTION)
    for advice in asked:
        (file, *_) = re.findall(r"[\w-]+\.pth", advice)
        assert f"`{file}`" in text, file
    assert f"`{DETECTOR_ID}`" in text and f"`{CLIP_ID}`" in text


def test_settings_of_weight_files_exist() -> None:
    settings = re.findall(r"`(loss\.[\w.]+)`", read_page("weights.md"))
    assert len(settings) >= 4
    for setting in settings:
        found: Any = recipe_class("tokenizer")
        for name in setting.split("."):
            (field,) = (each for each in dataclasses.fields(found) if each.name == name)
            found = field.type


def test_the_default_of_the_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UNIMM_DATA", raising=False)
    (default,) = re.findall(r"^\| `UNIMM_DATA` \| `([^`]+)`", read_page("weights.md"), flags=re.MULTILINE)
    assert filled("$UNIMM_DATA") == default
    assert os.environ.get("UNIMM_DATA") is None


# ---- code on the other pages ----


@pytest.mark.parametrize("name", ["tokenizer.md", "model_card.md"])
def test_python_runs(name: str) -> None:
    blocks = code_blocks(name, "python")
    assert blocks
    for block in blocks:
        exec(compile(block, name, "exec"), {})

"""docs/tutorial.md: its YAML files and commands run one after the other and end in a drawing.

The sizes are tiny: overrides behind each command replace the encoder, the host and the number of steps. Generated
images of the shapes data set, with captions, stand in for the reader's own.
"""

import shlex
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import ROOT
from tests.docs.pages import code_blocks, read_page, run_recipe, shell_commands
from unimm.cli import main

PAGE = "tutorial.md"
HOST, ENCODER = "Qwen/Qwen3-0.6B", "siglip2-base-p16-256"
SHORT_TOKENIZER = [
    "data.image_size=32",
    "train.steps=2",
    "train.batch_size=4",
    "train.num_workers=0",
    "train.warmup_steps=1",
]
SHORT_TOKENIZER += ["train.mixed_precision=no", "train.panel_steps=2", "train.save_steps=2"]
SHORT_HOST = [
    "data.image_size=32",
    "data.num_eval_samples=4",
    "train.max_steps=2",
    "train.per_device_train_batch_size=4",
]
SHORT_HOST += [
    "train.per_device_eval_batch_size=4",
    "train.bf16=false",
    "train.dataloader_num_workers=0",
    "train.save_steps=2",
]
TINY = {
    "my/stage1.yaml": [
        *SHORT_TOKENIZER,
        "model.encoder=encoder",
        "model.config={codebook_size: 32, codebook_dim: 16}",
        "train.codebook_init_images=16",
        "train.restart_steps=1",
    ],
    "my/stage2.yaml": [*SHORT_TOKENIZER, "train.restart_steps=1"],
    "my/sft.yaml": SHORT_HOST,
    "my/t2i.yaml": [*SHORT_HOST, "train.eval_steps=2"],
}


def run_command(words: list[str]) -> int:
    """Run one of the tutorial's commands in this process, at a tiny size."""
    if words[0] == "unimm":
        return main(["host" if word == HOST else word for word in words[1:]])
    assert words[:2] == ["accelerate", "launch"]
    (recipe,) = (word for word in words if word.startswith("recipes/"))
    config = words[words.index("--config") + 1]
    return run_recipe(ROOT / recipe, ["--config", config, *TINY[config]])


@pytest.mark.slow
def test_the_tutorial_ends_in_a_drawing(workplace: Path) -> None:
    commands = [words for words in shell_commands(PAGE) if words[0] != "tensorboard"]
    for words in commands:
        assert run_command(words) == 0, shlex.join(words)
    for name in ("stage1", "stage2", "attached", "sft", "t2i"):
        assert (workplace / "my" / name / "model.safetensors").is_file(), name
    assert list((workplace / "my/t2i/tensorboard").iterdir())
    (code,) = code_blocks(PAGE, "python")
    exec(compile(code, PAGE, "exec"), {})
    assert {Image.open(name).size for name in ("copy.png", "drawing.png", "again.png")} == {(32, 32)}


def test_the_tutorial_is_complete() -> None:
    """Every YAML file that a command names is on the page, and the overrides of the test replace what they claim to."""
    files = {block.splitlines()[0].removeprefix("# ") for block in code_blocks(PAGE, "yaml")}
    named = [word for words in shell_commands(PAGE) for word in words if word.endswith(".yaml")]
    assert files == set(named) == set(TINY)
    text = read_page(PAGE)
    assert HOST in text and f"encoder: {ENCODER}" in text
    assert "kind: features" in text  # the default needs weight files that a reader does not have


def test_the_tutorial_names_an_encoder_and_its_size() -> None:
    import yaml

    from unimm.tokenizer.published import PUBLISHED

    sizes = {yaml.safe_load(block).get("data", {}).get("image_size") for block in code_blocks(PAGE, "yaml")}
    assert sizes - {None} == {PUBLISHED[ENCODER].image_size}

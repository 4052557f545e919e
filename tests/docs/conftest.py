"""What the pages' tests share: a folder with a reader's data, the tutorial's files, and a tiny encoder and host."""

import json
from pathlib import Path

import pytest
from transformers import SiglipVisionConfig, SiglipVisionModel

from tests.docs.pages import code_blocks
from unimm.data.shapes.datasets import ShapesImages
from unimm.testing.hosts import tiny_host


def write_my_images(folder: Path, count: int = 12) -> None:
    """Write captioned images, as the tutorial's first step describes them."""
    folder.mkdir(parents=True)
    for number in range(1, count + 1):
        row = ShapesImages(count, seed=3)[number - 1]
        row["image"].resize((48, 40)).save(folder / f"{number:04}.jpg")
        (folder / f"{number:04}.txt").write_text(row["text"], encoding="utf-8")


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the reader's data, the tutorial's YAML files, and a tiny encoder and host."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UNIMM_CACHE", str(tmp_path / "cache"))
    write_my_images(tmp_path / "my" / "images")
    (talk,) = code_blocks("tutorial.md", "json")
    pictured = {"image": "0001.jpg", "conversations": [{"from": "human", "value": "<image>\nWhat is it?"}]}
    pictured["conversations"].append({"from": "gpt", "value": "A shape."})  # type: ignore[attr-defined]
    rows = [json.loads(talk), pictured]
    (tmp_path / "my" / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 4), encoding="utf-8")
    for block in code_blocks("tutorial.md", "yaml"):
        name = block.splitlines()[0].removeprefix("# ")
        (tmp_path / name).write_text(block, encoding="utf-8")
    vision = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    SiglipVisionModel(vision).save_pretrained("encoder")
    host, texts = tiny_host("qwen3")
    host.save_pretrained("host")
    texts.save_pretrained("host")
    return tmp_path

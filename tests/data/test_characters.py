"""Halves of characters and file names that are no UTF-8: a counted bad row, named in a log that can be read."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from unimm.data.bad_rows import UsableRows
from unimm.data.characters import check_characters, half_character
from unimm.data.image_streams import ReadOptions, open_images
from unimm.data.sources.llava import LlavaConversations, LlavaOptions
from unimm.errors import UserError

HALF = "\ud83d"


def test_the_half_and_its_place_are_named() -> None:
    assert half_character("naïve 漢字 \U0001f642") is None and half_character("") is None
    assert half_character(f"a {HALF}!") == "U+D83D at character 3 of 4"
    with pytest.raises(UserError, match=r"half a character \(U\+DCFF at character 1 of 2\), which cannot be encoded"):
        check_characters("\udcff.")


def test_captions_with_half_a_character_are_bad_rows(tmp_path: Path) -> None:
    captions = ["red", f"half {HALF}", "blue"]
    for number in range(3):
        Image.new("RGB", (8, 8), "red").save(tmp_path / f"{number}.png")
    lines = [json.dumps({"file_name": f"{number}.png", "text": text}) for number, text in enumerate(captions)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    log = tmp_path / "log.jsonl"
    opened = open_images(str(tmp_path), ReadOptions())
    rows = UsableRows(opened, "here", captions=True, max_bad_share=1.0, log=log)
    assert [rows[number]["text"] for number in range(3)] == ["red", "blue", "blue"]
    (named,) = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert (named["row"], named["reason"]) == (1, "half a character") and "U+D83D at character 6" in named["detail"]


def test_conversations_with_half_a_character_are_bad_rows(tmp_path: Path) -> None:
    def talk(question: str, answer: str, **image: str) -> str:
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        return json.dumps({"conversations": turns, **image})

    lines = [talk("a", "b"), talk(HALF, "b"), talk("a", f"b {HALF}"), talk("<image>", "b", image=f"{HALF}.png")]
    (tmp_path / "talk.jsonl").write_text("\n".join(lines))
    log = tmp_path / "talk.skipped.jsonl"
    rows = LlavaConversations(tmp_path / "talk.jsonl", LlavaOptions(tmp_path, max_bad_share=1.0, log=log))
    assert len(rows) == 1
    named = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert [(line["row"], line["reason"]) for line in named] == [
        (1, "half a character"),
        (2, "half a character"),
        (3, "missing image"),
    ]


def test_a_file_name_that_is_no_utf8_is_named_in_the_log(tmp_path: Path) -> None:
    broken = os.fsencode(tmp_path) + b"/\xff.png"
    try:
        Path(os.fsdecode(broken)).write_bytes(b"no image")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    log = tmp_path / "log.jsonl"
    rows = UsableRows(open_images(str(tmp_path), ReadOptions()), "here", max_bad_share=1.0, log=log)
    assert [rows[number]["key"] for number in range(2)] == ["red.png"] * 2
    (named,) = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert named["reason"] == "damaged image" and "\udcff.png" in named["detail"]

"""The official layout, in and out, and what is no such folder."""

import json
from pathlib import Path

import pytest
from PIL import Image

from unimm.errors import UserError
from unimm.evaluation.geneval.files import official_results, read_folder, read_sanity_images, write_folder
from unimm.evaluation.geneval.prompts import official_prompts
from unimm.evaluation.geneval.scorers import ShapesScorer
from unimm.evaluation.runs.records import Record

BENCH, CLOCKS = official_prompts()[0], next(each for each in official_prompts() if each["tag"] == "counting")


def make(folder: Path, name: str, metadata: dict | None, images: tuple[str, ...]) -> Path:
    place = folder / name
    (place / "samples").mkdir(parents=True)
    if metadata is not None:
        (place / "metadata.jsonl").write_text(json.dumps(metadata))
    for image in images:
        Image.new("RGB", (8, 8), "red").save(place / "samples" / image, format="PNG")
    return folder


def test_any_number_of_digits_is_read_and_other_files_are_not(tmp_path: Path) -> None:
    make(tmp_path, "00007", BENCH, ("0000.png", "00001.png", "12.png", "grid.png", "1.jpg"))
    make(tmp_path, "12", CLOCKS, ("00000.png",))
    (tmp_path / "notes").mkdir()
    found = read_folder(tmp_path)
    assert found.prompts == {"00007": BENCH, "00012": CLOCKS}
    assert list(found.images) == [("00007", 0), ("00007", 1), ("00007", 12), ("00012", 0)]
    assert [row[:2] for row in found.content()] == list(found.images)
    assert len({row[2] for row in found.content()}) == 1  # four equal images


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    source = make(tmp_path / "in", "00007", BENCH, ("0000.png", "0003.png"))
    first = read_folder(source)
    target = write_folder(tmp_path / "out" / "deep", first.prompts, first.images)
    second = read_folder(target)
    assert second.prompts == first.prompts
    assert second.content() == first.content()
    assert [path.relative_to(target).as_posix() for path in second.images.values()] == [
        "00007/samples/00000.png",
        "00007/samples/00003.png",
    ]
    with pytest.raises(UserError, match="is not an empty folder: choose another"):
        write_folder(target, first.prompts, first.images)


def test_folders_of_another_layout_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no folder"):
        read_folder(tmp_path / "none")
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    with pytest.raises(UserError, match="is no GenEval folder: it has no folders such as 00000"):
        read_folder(tmp_path)
    with pytest.raises(UserError, match="has no metadata.jsonl"):
        read_folder(make(tmp_path / "a", "00000", None, ("0.png",)))
    with pytest.raises(UserError, match="holds no image with a name such as 00000.png"):
        read_folder(make(tmp_path / "b", "00000", BENCH, ("first.png",)))
    with pytest.raises(UserError, match="is no GenEval metadata"):
        read_folder(make(tmp_path / "c", "00000", {"prompt": "a bench"}, ("0.png",)))
    with pytest.raises(UserError, match="two folders with the number 3"):
        read_folder(make(make(tmp_path / "d", "3", BENCH, ("0.png",)), "00003", BENCH, ("0.png",)))
    with pytest.raises(UserError, match="are one sample, 0: keep one of them"):
        read_folder(make(tmp_path / "e", "3", BENCH, ("0.png", "00.png")))


def test_known_images_say_what_is_expected(tmp_path: Path) -> None:
    make(tmp_path, "00000", BENCH | {"expected": True}, ("0.png",))
    make(tmp_path, "00001", CLOCKS | {"expected": False}, ("0.png", "1.png"))
    known = read_sanity_images(tmp_path)
    assert [(each.name, each.expected) for each in known] == [
        ("00000/0", True),
        ("00001/0", False),
        ("00001/1", False),
    ]
    assert known[0].image.getpixel((0, 0)) == (255, 0, 0)
    make(tmp_path, "00002", CLOCKS, ("0.png",))
    with pytest.raises(UserError, match='00002: its metadata.jsonl needs "expected": true or false'):
        read_sanity_images(tmp_path)


def test_the_official_lines() -> None:
    """Keys and order of the official scorer's file; only detections that count, the best first, boxes with scores."""
    metadata = {"tag": "two_object", "include": [{"class": "ring", "count": 1}], "prompt": "a photo of a ring"}
    detections = [
        {"label": "ring", "box": [0, 0, 4, 4], "score": 0.5},
        {"label": "ring", "box": [4, 4, 8, 8], "score": 0.75},
        {"label": "circle", "box": [1, 1, 2, 2], "score": 0.25},
        {"label": "cross", "box": [1, 1, 2, 2], "score": 0.0},
    ]
    raw = {"detections": detections}
    record = Record("geneval", "00003", 1, 0, metadata, "images/a.png", raw, False, "expected ring>=3, found 2")
    (line,) = official_results([record], ShapesScorer()).splitlines()
    row = json.loads(line)
    assert list(row) == ["filename", "tag", "prompt", "correct", "reason", "metadata", "details"]
    assert json.loads(row["metadata"]) == metadata
    details = json.loads(row["details"])
    assert list(details) == ["circle", "ring"]
    assert details["ring"] == [[4, 4, 8, 8, 0.75], [0, 0, 4, 4, 0.5]]
    assert (row["correct"], row["filename"]) == (False, "images/a.png")

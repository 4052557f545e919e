"""eval/nearest.py on planted drawings: what comes out, and a run that is killed and goes on."""

import json
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features, Image, Value
from PIL import Image as Images

from unimm.errors import UserError
from unimm.evaluation.nearest import command as nearest


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    rng = np.random.default_rng(0)
    images = [Images.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)) for _ in range(6)]
    path = tmp_path_factory.mktemp("captioned") / "captioned.parquet"
    rows = {"image": images, "text": [f"thing {i // 2}" for i in range(6)]}
    Dataset.from_dict(rows, features=Features({"image": Image(), "text": Value("string")})).to_parquet(path)
    return path


def run(model_folder, source, output, *more) -> dict:
    arguments = ["--model", str(model_folder), "--source", str(source), "--batch-size", "4", "--output", str(output)]
    nearest.main([*arguments, "--json", str(output.with_suffix(".json")), *more])
    return json.loads(output.with_suffix(".json").read_text())


def planted(shift: int):
    """A painter that draws the image `shift` rows further on."""

    def draw(evaluated, names, originals, seeds, sampling):
        return [Images.fromarray(image) for image in np.roll(originals, shift, axis=0)]

    return draw


def test_right_drawings_are_found_and_wrong_ones_are_not(model_folder, source, tmp_path, monkeypatch):
    monkeypatch.setitem(nearest._DRAW, "drawing", planted(0))
    right = run(model_folder, source, tmp_path / "right", "--page", str(tmp_path / "page.html"))
    assert right["drawing"] == {"matches": 6, "images": 6, "share": 1.0, "mean_rank": 1.0}
    assert "thing 2" in (tmp_path / "page.html").read_text()
    monkeypatch.setitem(nearest._DRAW, "drawing", planted(1))
    wrong = run(model_folder, source, tmp_path / "wrong")
    assert wrong["drawing"]["matches"] == 0
    records = [json.loads(line) for line in (tmp_path / "wrong" / "records.jsonl").read_text().splitlines()]
    drawn = {record["item"]: record["reason"] for record in records if record["inputs"]["part"] == "drawing"}
    assert drawn["drawing 2: thing 1"] == "nearer to another: thing 0"  # the second row's, which was drawn for it
    assert wrong["reconstruction"] == right["reconstruction"]


def test_a_killed_run_goes_on_to_the_same_bytes(model_folder, source, tmp_path, monkeypatch):
    run(model_folder, source, tmp_path / "whole")
    draw, calls = nearest._DRAW["drawing"], []

    def killed(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return draw(*arguments)

    monkeypatch.setitem(nearest._DRAW, "drawing", killed)
    with pytest.raises(KeyboardInterrupt):
        run(model_folder, source, tmp_path / "killed")
    assert not (tmp_path / "killed" / "records.jsonl").exists()
    run(model_folder, source, tmp_path / "killed")
    assert len(calls) == 3  # the first block was not drawn again
    whole, killed_run = ((tmp_path / name / "records.jsonl").read_bytes() for name in ("whole", "killed"))
    assert whole == killed_run


def test_bad_input(model_folder, tokenizer_folder, source, tmp_path):
    with pytest.raises(UserError, match="cannot draw"):
        run(tokenizer_folder, source, tmp_path / "out")
    with pytest.raises(UserError, match="at least two images, each with a caption"):
        run(model_folder, source, tmp_path / "out", "--num-images", "1")
    assert not (tmp_path / "out").exists()

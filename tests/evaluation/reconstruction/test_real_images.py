"""Real images through eval/reconstruction.py with the embedded tokenizer, to a page that a browser shows."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.browser import browse, in_a_browser
from unimm.evaluation.runs.html_report import write_report
from unimm.evaluation.runs.records import read_records

main = importlib.import_module("eval.reconstruction").main
Data = Callable[[str], Path]


@in_a_browser
@pytest.mark.parametrize(("source", "count"), [("data/cc0", 8), ("data/photos/test.parquet", 12)])
def test_a_page_of_real_images(source: str, count: int, unimm_data: Data, tmp_path: Path) -> None:
    run, page, shot = tmp_path / "run", tmp_path / "page.html", tmp_path / "shot.png"
    main(["--source", str(unimm_data(source)), "--num-images", str(count), "--output", str(run)])
    summary = json.loads((run / "summary.json").read_text())
    assert summary["num_images"] == count and summary["distances"]["fd_own_encoder"] > 0
    assert summary["reconstruction"]["psnr"] > 10  # the embedded tokenizer has seen the shapes data set alone
    write_report(run, page)
    browse(page, f"--screenshot={shot}", height=2600)
    pixels = np.asarray(Image.open(shot).convert("RGB"))
    worst = min(read_records(run), key=lambda record: record.raw_scores["psnr"])  # the first card of the page
    for path in (worst.inputs["original_path"], str(worst.output_path)):
        assert shows(pixels, np.asarray(Image.open(run / path).convert("RGB"))), path


def shows(pixels: np.ndarray, image: np.ndarray) -> bool:
    """Whether the colors of an image, which the browser enlarges without mixing them, stand on the screen."""
    weights = np.array([1, 256, 65536])
    wanted = np.unique(image.astype(int)[8::16, 8::16] @ weights)
    return bool(np.isin(wanted, pixels.astype(int) @ weights).mean() > 0.9)

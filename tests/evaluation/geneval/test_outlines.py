"""A mask and its outline are the same pixels."""

import builtins
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from unimm.errors import UserError
from unimm.evaluation.geneval.outlines import outlines


def filled(polygons: list[list[float]], height: int, width: int, zoom: int = 8) -> np.ndarray:
    """The polygons by the even-odd rule, drawn large: the share of each pixel that is covered."""
    inside = np.zeros((height * zoom, width * zoom), bool)
    for flat in polygons:
        layer = Image.new("1", (width * zoom, height * zoom))
        ImageDraw.Draw(layer).polygon([zoom * side for side in flat], fill=1)
        inside ^= np.asarray(layer)
    return inside.reshape(height, zoom, width, zoom).mean(axis=(1, 3))


@pytest.fixture
def mask() -> np.ndarray:
    """A ring cut off by the image's edge, and a bar beside it."""
    rows, columns = np.mgrid[:60, :80]
    distance = np.hypot(rows - 28, columns - 18)
    return ((distance < 25) & (distance > 10)) | ((columns > 60) & (rows > 6) & (rows < 50))


def test_outer_borders_and_those_of_holes(mask: np.ndarray) -> None:
    found = outlines(mask)
    assert len(found) == 3
    assert sum(len(flat) // 2 for flat in found) < 120  # and not one point for every pixel of the border
    assert ((filled(found, 60, 80) > 0.5) == mask).mean() > 0.98


def test_corners_are_those_of_boxes() -> None:
    square = np.zeros((30, 40), bool)
    square[5:25, 8:32] = True
    (flat,) = outlines(square)
    points = np.array(flat).reshape(-1, 2)
    assert points.min(axis=0).tolist() == [8, 5] and points.max(axis=0).tolist() == [32, 25]
    assert outlines(np.zeros((30, 40), bool)) == []


def test_without_scikit_image_one_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *rest: Any) -> Any:
        if name.startswith("skimage"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(UserError, match=r"install unimm\[eval\]"):
        outlines(np.ones((4, 4), bool))

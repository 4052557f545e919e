"""Which image tokens a mask or a share redraws."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from unimm.errors import UserError
from unimm.mllm.conditions import keep_outside, mask_cells, redrawn_share


def touched(white: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Return the cells that a white pixel overlaps, by exact fractions."""
    height, width = white.shape
    cells = np.zeros((rows, columns), dtype=bool)
    for y, x in np.argwhere(white):
        for row in range(rows):
            for column in range(columns):
                down = max(Fraction(int(y), height), Fraction(row, rows)) < min(
                    Fraction(int(y) + 1, height), Fraction(row + 1, rows)
                )
                across = max(Fraction(int(x), width), Fraction(column, columns)) < min(
                    Fraction(int(x) + 1, width), Fraction(column + 1, columns)
                )
                cells[row, column] |= down and across
    return cells


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (4, 4), (7, 5), (16, 24), (33, 9)])
def test_a_cell_that_white_touches_is_redrawn(size: tuple[int, int]) -> None:
    generator = np.random.default_rng(sum(size))
    for grid in ((4, 4), (3, 5)):
        white = generator.random(size) < 3 / (size[0] * size[1])
        white[generator.integers(size[0]), generator.integers(size[1])] = True
        mask = Image.fromarray((white * 255).astype(np.uint8))
        assert np.array_equal(mask_cells(mask, grid), touched(white, *grid))


def test_kinds_of_masks(tmp_path: object) -> None:
    cells = np.zeros((4, 4), dtype=bool)
    cells[1, 2:] = True
    blocks = np.kron(cells, np.full((8, 8), 255)).astype(np.uint8)
    clear = np.dstack([np.zeros((32, 32, 3), np.uint8), 255 - blocks])  # transparent where it is redrawn
    kinds = [cells, torch.from_numpy(cells), cells.tolist(), Image.fromarray(blocks), np.dstack([blocks] * 3)]
    for mask in [*kinds, Image.fromarray(cells), Image.fromarray(clear, "RGBA"), Image.fromarray(blocks).convert("P")]:
        assert np.array_equal(mask_cells(mask, (4, 4)), cells)


def test_a_mask_is_padded_as_the_image_is() -> None:
    """A wide image in a square: 8 x 16 pixels lie in the middle half of the rows."""
    white = np.zeros((8, 16), dtype=np.uint8)
    white[0, 0] = white[7, 15] = 255
    cells = np.argwhere(mask_cells(Image.fromarray(white), (4, 4), square=True))
    assert cells.tolist() == [[1, 0], [2, 3]]


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (np.zeros((4, 4), dtype=bool), "redraws 0 of 16 image tokens"),
        (Image.new("L", (9, 9)), "redraws 0 of 16 image tokens"),
        (np.ones((5, 4), dtype=bool), "5 x 4 booleans, and this model draws 4 x 4"),
        (np.ones(16, dtype=bool), "16 booleans, and this model draws 4 x 4"),
        ("no/mask.png", "no such file"),
        (7, "not int"),
    ],
)
def test_masks_without_a_meaning(mask: object, said: str) -> None:
    with pytest.raises(UserError, match=said):
        mask_cells(mask, (4, 4))


def test_a_share_is_exact_and_random() -> None:
    for strength, count in ((0.5, 128), (1, 256), (0.001, 1), (0.25, 64)):
        redrawn = redrawn_share(strength, [1, 2, 1], 256)
        assert redrawn.sum(1).tolist() == [count] * 3 and torch.equal(redrawn[0], redrawn[2])
        assert count == 256 or not torch.equal(redrawn[0], redrawn[1])
    for wrong in (0, -0.5, 1.5, "half", float("nan"), True):
        with pytest.raises(UserError, match="strength is"):
            redrawn_share(wrong, [1], 256)
    ids = torch.arange(4)[None]
    assert keep_outside(ids, torch.tensor([[True, False, False, True]])).tolist() == [[-1, 1, 2, -1]]

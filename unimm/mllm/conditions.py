"""Images as conditions of drawing: which image tokens of a source image are kept, from a mask or a share of them.

B prompts, S sequences, M = h * w image tokens, H W pixels of a mask.
"""

from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unimm.data.arrays import is_array, to_numpy
from unimm.data.images import read_image
from unimm.errors import UserError
from unimm.mllm.vocabulary import VisualVocabulary

DRAWN = -1
"""The entry of a token that is drawn, not forced."""


_WHITE = 128
"""Gray level from which a mask's pixel is white."""


def mask_cells(mask: Any, grid: Sequence[int], *, square: bool = False) -> np.ndarray:
    """Return the cells [h, w] of the token grid that a mask redraws.

    Args:
        mask: an image as for `unimm.data.images.read_image`, of any size, stretched over the source image: a cell that
            a white (or transparent) pixel touches is redrawn. Or the cells themselves, [h, w] of booleans.
        grid: rows and columns of image tokens, (h, w).
        square: whether the image processor pads images to a square, which the mask follows.

    Raises:
        UserError: if the mask cannot be read, has booleans of another grid, or redraws nothing.
    """
    rows, columns = grid
    cells = np.asarray(mask) if isinstance(mask, list | tuple) else to_numpy(mask) if is_array(mask) else None
    if cells is None or cells.dtype != bool:
        white = np.asarray(read_image(mask).convert("L")) >= _WHITE  # [H, W]
        if square:
            height, width = white.shape
            side = max(white.shape)
            top, left = (side - height) // 2, (side - width) // 2  # as the image processor pads
            white = np.pad(white, ((top, side - height - top), (left, side - width - left)))
        down, across = _touches(rows, white.shape[0]), _touches(columns, white.shape[1])
        cells = (down.astype(np.float32) @ white @ across.T.astype(np.float32)) > 0
    elif cells.shape != (rows, columns):
        raise UserError(
            f"The mask has {' x '.join(map(str, cells.shape))} booleans, and this model draws {rows} x {columns} image "
            "tokens: give one for each, or a mask image."
        )
    if not cells.any():
        raise UserError(f"The mask redraws 0 of {cells.size} image tokens: paint white what is to be redrawn.")
    return cells


def redrawn_cells(model: Any, processor: Any, mask: Any) -> np.ndarray:
    """Return the cells [h, w] of a model's token grid that a mask redraws, see `mask_cells`.

    Raises:
        UserError: if the image tokens are no patches, or as `mask_cells`.
    """
    if not model.image_tokenizer.ids_are_patches:
        kind = type(model.image_tokenizer).__name__
        raise UserError(f"The image tokens of a {kind} are no patches, so a mask cannot choose among them.")
    return mask_cells(mask, processor.image_grid, square=processor.image_processor.pad_to_square)


def _touches(cells: int, pixels: int) -> np.ndarray:
    """Return which of `pixels` pixels along a side overlap each of its `cells` cells, [cells, pixels] of booleans."""
    cell, pixel = np.arange(cells)[:, None], np.arange(pixels)[None]
    return (cell * pixels < (pixel + 1) * cells) & (pixel * cells < (cell + 1) * pixels)


def redrawn_share(strength: Any, seeds: Sequence[int], tokens: int) -> Tensor:
    """Return which tokens are redrawn, [len(seeds), M] of booleans: a random share `strength` of them for each seed.

    Raises:
        UserError: if `strength` is not above 0 and at most 1.
    """
    if not isinstance(strength, Real) or isinstance(strength, bool) or not 0 < float(strength) <= 1:
        raise UserError(
            f"strength is {strength!r}; give the share of image tokens to redraw, above 0 and at most 1, which redraws "
            "all."
        )
    count = max(1, round(float(strength) * tokens))
    redrawn = torch.zeros(len(seeds), tokens, dtype=torch.bool)
    for row, seed in zip(redrawn, seeds, strict=True):
        row[torch.from_numpy(np.random.default_rng(seed).permutation(tokens)[:count])] = True
    return redrawn


def image_token_ids(model: Any, processor: Any, image: Any) -> Tensor:
    """Return the token ids [1, M] of a source image, on the CPU."""
    pixel_values = processor.image_processor([read_image(image)], return_tensors="pt")["pixel_values"]
    token_ids: Tensor = model.get_image_tokens(pixel_values.to(model.device, model.dtype)).cpu()
    return token_ids


def keep_outside(token_ids: Tensor, redrawn: Tensor | np.ndarray) -> Tensor:
    """Return forced token ids [S, M] for `generate`: those of an image [1, M], -1 where `redrawn` is true, [S, M], or
    the cells [h, w] of a mask."""
    rows = torch.as_tensor(redrawn).reshape(-1, token_ids.shape[1])
    return torch.where(rows, DRAWN, token_ids.to(rows.device))


def forced_rows(given: Tensor | None, batch: int, repeats: int, length: int, vocabulary: VisualVocabulary) -> Tensor:
    """Return the forced token ids of every sequence, [S, M] with -1 for tokens to draw, S = batch * repeats.

    Args:
        given: token ids [B, M], or one row per sequence, [S, M]; None forces nothing.

    Raises:
        UserError: if the shape is another, or an entry is neither -1 nor an image id.
    """
    if given is None:
        return torch.full((batch * repeats, length), DRAWN)
    shapes = [[rows, length] for rows in sorted({batch, batch * repeats})]
    whole = not (given.is_floating_point() or given.is_complex() or given.dtype == torch.bool)
    if list(given.shape) not in shapes or not whole:
        raise UserError(
            f"forced_token_ids has the shape {list(given.shape)} and the type {given.dtype}: give whole numbers as "
            f"{' or '.join(map(str, shapes))}, -1 for tokens to draw."
        )
    rows = given.detach().long().cpu()
    wrong = rows[(rows != DRAWN) & ~vocabulary.contains(rows)]
    if len(wrong):
        raise UserError(
            f"forced_token_ids holds {int(wrong[0])}: image ids are {vocabulary.base} to {vocabulary.end - 1} in this "
            "model's vocabulary, and -1 is a token to draw."
        )
    return rows if len(rows) == batch * repeats else rows.repeat_interleave(repeats, 0)

"""Resizing whose cost follows the pixels of the image and of the result, also if one side is 100 000 times the other.

A strip that is cut to a square, or padded to one, passes through an image with far more pixels than both. Ordinary
images take that way, as they always did. For a strip only the part that is kept is computed, by the same filter at the
same places and in the same order; values differ by one level of 255 at most, in rare roundings.
"""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

WHOLE_PIXELS = 2**22
"""Up to so many pixels between the image and the result are always made as a whole (2048 x 2048: 16 MB)."""
WHOLE_FACTOR = 4
"""And up to so many times those of the image itself."""

SUPPORT = {
    Image.Resampling.NEAREST: 0.5,
    Image.Resampling.BOX: 0.5,
    Image.Resampling.BILINEAR: 1.0,
    Image.Resampling.HAMMING: 1.0,
    Image.Resampling.BICUBIC: 2.0,
    Image.Resampling.LANCZOS: 3.0,
}
"""How far each filter of Pillow reaches, in pixels of the smaller side."""


def is_strip(size: tuple[int, int], between: tuple[int, int]) -> bool:
    """Tell whether an image of `size` is too small to be made `between` as a whole."""
    return math.prod(between) > max(WHOLE_PIXELS, WHOLE_FACTOR * math.prod(size))


def resized_crop(
    image: Image.Image, resized: tuple[int, int], corner: Sequence[int], size: int, resample: Image.Resampling
) -> Image.Image:
    """Resize `image` to `resized` (width, height), then cut out the square of `size` with its left top at `corner`."""
    left, top = corner
    if not is_strip(image.size, resized):
        whole = image if image.size == resized else image.resize(resized, resample)
        return whole.crop((left, top, left + size, top + size))
    spans = [
        _span(start * side / new, (start + size) * side / new, side, SUPPORT[resample] * max(1.0, side / new))
        for start, side, new in zip(corner, image.size, resized, strict=True)
    ]
    (x0, x1, *xs), (y0, y1, *ys) = spans
    part = image.crop((x0, y0, x1, y1))
    return part.resize((size, size), resample, box=(xs[0], ys[0], xs[1], ys[1]))


def padded_strip(
    image: Image.Image, size: tuple[int, int], color: tuple[int, ...], resample: Image.Resampling
) -> Image.Image:
    """Resize a strip in the middle of a square of `color`, which is never made, to `size` (width, height)."""
    width, height = size
    result = Image.new("RGB", size, color)
    if image.height > image.width:
        first, part = _across(image, image.height, width, color, resample)
        result.paste(part.resize((part.width, height), resample), (first, 0))
    else:
        turned = image.resize((width, image.height), resample).transpose(Image.Transpose.TRANSPOSE)
        first, part = _across(turned, image.width, height, color, resample)
        result.paste(part.transpose(Image.Transpose.TRANSPOSE), (0, first))
    return result


def _across(
    image: Image.Image, side: int, new: int, color: tuple[int, ...], resample: Image.Resampling
) -> tuple[int, Image.Image]:
    """Resize the rows of an image in the middle of `side` columns of `color` to `new` columns; return the number of the
    first one that the image reaches, and those that it reaches."""
    scale, left = side / new, (side - image.width) // 2
    reach = SUPPORT[resample] * max(1.0, scale)
    first = max(0, math.floor((left - reach) / scale))
    last = min(new, math.ceil((left + image.width + reach) / scale))
    x0, x1, start, end = _span(first * scale, last * scale, side, reach)
    single = np.zeros((image.width, x1 - x0), dtype=np.float32)  # each column of the image alone: gives its weights
    np.fill_diagonal(single[:, left - x0 :], 1)
    box = (start, 0, end, image.width)
    weights = np.asarray(Image.fromarray(single).resize((last - first, image.width), resample, box=box))
    padding = 1 - weights.sum(0)  # [columns], the share of the color
    pixels = np.asarray(image)
    rows = np.empty((image.height, last - first, 3), dtype=np.uint8)
    step = max(1, WHOLE_PIXELS // image.width)
    for row in range(0, image.height, step):
        for channel, level in enumerate(color):
            values = pixels[row : row + step, :, channel].astype(np.float32) @ weights + padding * level
            rows[row : row + step, :, channel] = np.clip(values + 0.5, 0, 255)  # rounded as Pillow does
    return first, Image.fromarray(rows)


def _span(start: float, end: float, side: int, reach: float) -> tuple[int, int, float, float]:
    """Return the whole pixels [first, last) that a filter of this reach reads for [start, end), and these within them:
    Pillow keeps a box in single precision, which near 0 is exact enough."""
    first, last = max(0, math.floor(start - reach) - 1), min(side, math.ceil(end + reach) + 1)
    return first, last, max(0.0, start - first), min(float(last - first), end - first)

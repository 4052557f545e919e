"""Resizing whose cost is bounded by the pixels of the image and of the result, also for extreme aspect ratios
(100 000 : 1).

Resizing and then cropping (or padding) a strip to a square goes through an intermediate image with far more pixels than
either. Ordinary images take that path. For a strip only the kept part is computed, with the same filter at the same
positions and in the same order; values differ by at most one level of 255, due to rounding.
"""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

WHOLE_PIXELS = 2**22
"""Intermediate images of up to this many pixels are always computed whole (2048 x 2048: 16 MB)."""
WHOLE_FACTOR = 4
"""So are those of up to this many times the pixels of the input."""

SUPPORT = {
    Image.Resampling.NEAREST: 0.5,
    Image.Resampling.BOX: 0.5,
    Image.Resampling.BILINEAR: 1.0,
    Image.Resampling.HAMMING: 1.0,
    Image.Resampling.BICUBIC: 2.0,
    Image.Resampling.LANCZOS: 3.0,
}
"""Support (radius) of each Pillow filter, in pixels of the smaller side."""


def is_strip(size: tuple[int, int], between: tuple[int, int]) -> bool:
    """Return whether the intermediate image `between` is too large, given an image of `size`, to compute whole."""
    return math.prod(between) > max(WHOLE_PIXELS, WHOLE_FACTOR * math.prod(size))


def resized_crop(
    image: Image.Image, resized: tuple[int, int], corner: Sequence[int], size: int, resample: Image.Resampling
) -> Image.Image:
    """Resize `image` to `resized` (width, height), then crop the square of side `size` at `corner` (left, top)."""
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
    """Pad a strip to a square of `color`, centered, and resize to `size` (width, height), without allocating the
    square."""
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
    """Center an image in `side` columns of `color` and resize the rows to `new` columns; return the number of the first
    column that the image touches, and the columns that it touches."""
    scale, left = side / new, (side - image.width) // 2
    reach = SUPPORT[resample] * max(1.0, scale)
    first = max(0, math.floor((left - reach) / scale))
    last = min(new, math.ceil((left + image.width + reach) / scale))
    x0, x1, start, end = _span(first * scale, last * scale, side, reach)
    # Resizing one-hot columns yields Pillow's own filter weights.
    single = np.zeros((image.width, x1 - x0), dtype=np.float32)
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
    """Return the whole pixels [first, last) that a filter of this reach reads for [start, end), and start and end
    relative to them: Pillow stores a box in single precision, which is exact enough only near 0."""
    first, last = max(0, math.floor(start - reach) - 1), min(side, math.ceil(end + reach) + 1)
    return first, last, max(0.0, start - first), min(float(last - first), end - first)


def crop(image: Image.Image, size: int, offset: Sequence[float] = (0.5, 0.5)) -> Image.Image:
    """Resize the short side to `size` (bicubic), then crop a square at `offset` (0 = left/top, 1 = right/bottom)."""
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    corner = [round(o * (side - size)) for o, side in zip(offset, (width, height), strict=True)]
    return resized_crop(image, (width, height), corner, size, Image.Resampling.BICUBIC)


def adm_crop(image: Image.Image, size: int, resample: Image.Resampling = Image.Resampling.BICUBIC) -> Image.Image:
    """Center-crop as the data loaders of ADM (arXiv 2105.05233) and LlamaGen do.

    The image is halved with a box filter while its short side is at least 2 x `size`, then resized (short side to
    `size`), then cropped.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    corner = (width - size) // 2, (height - size) // 2
    return resized_crop(image, (width, height), corner, size, resample)


def views_of(image: Image.Image, *, size: int, scales: Sequence[float] = (), flip: bool = False) -> list[Image.Image]:
    """Return the crops of an image, `size` pixels a side: the center, or five crops (corners and center) per scale.

    A scale is the side of ADM's center crop that the five are taken from, over `size`. With `flip` each crop is
    followed by its mirror image. LlamaGen's ten-crop is one scale, 1.1, with `flip` (it trains on two, 1.1 and 1.05).
    """
    views = [] if scales else [crop(image, size)]
    for scale in scales:
        whole = adm_crop(image, int(size * scale))
        rest = whole.width - size
        corners = [(0, 0), (rest, 0), (0, rest), (rest, rest), (round(rest / 2), round(rest / 2))]
        views += [whole.crop((left, top, left + size, top + size)) for left, top in corners]
    if not flip:
        return views
    return [each for view in views for each in (view, view.transpose(Image.Transpose.FLIP_LEFT_RIGHT))]

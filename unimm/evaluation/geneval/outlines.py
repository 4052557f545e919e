"""Masks as polygons: small enough to stand in a record, for the page that shows what a detector saw."""

import numpy as np

from unimm.errors import UserError

TOLERANCE = 1 / 250  # of the longer side: less than a pixel of a thumbnail


def outlines(mask: np.ndarray) -> list[list[float]]:
    """The borders of a mask [H, W], outer ones and those of holes, each x1, y1, x2, y2, ... in pixels.

    Corners of pixels are whole numbers, as in boxes; filled by the even-odd rule the polygons give the mask again, to
    `TOLERANCE`.

    Raises:
        UserError: scikit-image is not installed.
    """
    try:
        from skimage.measure import approximate_polygon, find_contours
    except ImportError:
        raise UserError("Masks are outlined by scikit-image, which is not installed: install unimm[eval].") from None
    borders = find_contours(np.pad(mask, 1).astype(np.float32), 0.5)  # rows, columns between the centres of pixels
    simple = [approximate_polygon(border, TOLERANCE * max(mask.shape)) for border in borders]
    return [(border[:-1, ::-1] - 0.5).round(1).flatten().tolist() for border in simple if len(border) > 3]

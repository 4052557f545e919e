"""Convert masks to polygons, small enough to store in a record; the report draws them as the detector's output."""

import numpy as np

from unimm.errors import UserError

TOLERANCE = 1 / 250  # of the longer side: less than a pixel of a thumbnail


def outlines(mask: np.ndarray) -> list[list[float]]:
    """Return the outer borders and hole borders of a mask [H, W], each as x1, y1, x2, y2, ... in pixels.

    Pixel corners have integer coordinates, as in boxes. Filled by the even-odd rule, the polygons reproduce the mask up
    to `TOLERANCE`.

    Raises:
        UserError: scikit-image is not installed.
    """
    try:
        from skimage.measure import approximate_polygon, find_contours
    except ImportError:
        raise UserError("Masks are outlined by scikit-image, which is not installed: install unimm[eval].") from None
    borders = find_contours(np.pad(mask, 1).astype(np.float32), 0.5)  # (row, column), pixel centers at integers
    # Padding added 1, and in corner coordinates a pixel's center is at +0.5: subtract 0.5 in all.
    simple = [approximate_polygon(border, TOLERANCE * max(mask.shape)) for border in borders]
    return [(border[:-1, ::-1] - 0.5).round(1).flatten().tolist() for border in simple if len(border) > 3]

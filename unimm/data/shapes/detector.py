"""A rule-based object detector for images of the shapes data set.

Each connected component is measured in closed form. Its color is the median of its inner pixels, its coverage is the
projection of each pixel on the line from the background to that color, and for each candidate shape the area and
centroid of the coverage determine center and size to a fraction of a pixel (blur changes neither). The detected shape
is the one whose analytic template overlaps the coverage best, and that overlap (a soft intersection over union) is the
score. Reconstructed images are soft and speckled, so templates are both sharp and blurred, thresholds are relative to
the local contrast, and small specks are dropped.
"""

from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from unimm.data.images import to_rgb
from unimm.data.shapes.world import BACKGROUNDS, COLORS, DISTANCES, SHAPES

MIN_CONTRAST = 40.0  # RGB distance from the background; the weakest pair (purple on gray) has 80
MIN_AREA = 40.0  # pixels; the smallest object of the data set covers 128
MIN_SCORE = 0.6  # a component with a lower overlap is not a shape
MARGIN = 2  # pixels of soft edge that are counted around a component
BLURS = (0.0, 1.0, 1.7)  # sigmas of the blurred templates, in pixels
# Area divided by radius², and the offset of the centroid below the center of the box, divided by the radius.
AREAS = {"circle": np.pi, "square": 4.0, "triangle": 2.0, "diamond": 2.0, "cross": 20 / 9, "ring": 0.75 * np.pi}
CENTROID_DROP = {"triangle": 1 / 3}
_COLOR_NAMES, _COLOR_VALUES = list(COLORS), np.array(list(COLORS.values()), dtype=np.float32)
_TONE_NAMES, _TONE_VALUES = list(BACKGROUNDS), np.array(list(BACKGROUNDS.values()), dtype=np.float32)


@dataclass(frozen=True)
class Detection:
    """A detected object: `box` is (x1, y1, x2, y2) in pixels, `score` its overlap with the ideal shape, in [0, 1]."""

    shape: str
    color: str
    box: tuple[float, float, float, float]
    score: float

    def as_rule_input(self) -> dict[str, Any]:
        """Return the mapping that `unimm.evaluation.geneval.rules.verdict` takes: label, color, box, score."""
        fields = asdict(self)
        return {"label": fields.pop("shape"), **fields}


def detect(
    image: Image.Image | np.ndarray, *, min_area: float = MIN_AREA, min_score: float = MIN_SCORE
) -> list[Detection]:
    """Detect the objects of an image (PIL, or uint8 [H, W, 3]), from top to bottom.

    Components with fewer than `min_area` pixels or a score below `min_score` are dropped.
    Raises ValueError for an array of another type or layout.
    """
    pixels = _as_float(image)  # [H, W, 3]
    tone = _background_tone(pixels)
    contrast = np.sqrt(((pixels - tone) ** 2).sum(axis=-1))  # [H, W]
    # An edge runs at half of the local contrast; the window is narrower than the gap between objects.
    mask = contrast > np.maximum(MIN_CONTRAST, _window_maximum(contrast, MARGIN) / 2)
    labels, count = label_components(mask)
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    found = (_read(pixels, tone, labels, index) for index in range(1, count + 1) if areas[index] >= min_area)
    return [detection for detection in found if detection.score >= min_score]


def background_of(image: Image.Image | np.ndarray) -> str:
    """Return the name of the background color that is nearest to an image's border."""
    return _nearest(_background_tone(_as_float(image)), _TONE_NAMES, _TONE_VALUES)


def label_components(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """Label the 4-connected components of a boolean [H, W]; return the labels (0 outside, 1.. from top to bottom) and
    their number."""
    height, width = mask.shape
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, starts = np.nonzero(edges == 1)
    ends = np.nonzero(edges == -1)[1]  # row-major like the starts: run i spans starts[i]:ends[i]
    parent = list(range(len(rows)))

    def root(run: int) -> int:
        while parent[run] != run:
            parent[run] = run = parent[parent[run]]
        return run

    first_of_row = np.searchsorted(rows, np.arange(height + 1)).tolist()
    left, right = starts.tolist(), ends.tolist()
    for row in range(1, height):
        above, above_end = first_of_row[row - 1], first_of_row[row]
        for run in range(first_of_row[row], first_of_row[row + 1]):
            while above < above_end and right[above] <= left[run]:
                above += 1
            touching = above
            while touching < above_end and left[touching] < right[run]:
                a, b = root(touching), root(run)
                parent[max(a, b)] = min(a, b)
                touching += 1
    roots = [root(run) for run in range(len(parent))]
    numbers = {run: number for number, run in enumerate(dict.fromkeys(roots), start=1)}
    labels = np.zeros((height, width), dtype=np.int32)
    labels[mask] = np.repeat([numbers[run] for run in roots], ends - starts)
    return labels, len(numbers)


def _read(pixels: np.ndarray, tone: np.ndarray, labels: np.ndarray, index: int) -> Detection:
    """Measure color, shape and box of one component."""
    ys, xs = np.nonzero(labels == index)
    y1, y2 = max(int(ys[0]) - MARGIN, 0), min(int(ys[-1]) + 1 + MARGIN, labels.shape[0])
    x1, x2 = max(int(xs.min()) - MARGIN, 0), min(int(xs.max()) + 1 + MARGIN, labels.shape[1])
    window, member = pixels[y1:y2, x1:x2], labels[y1:y2, x1:x2] == index
    color = _plain_color(window, member, tone)
    direction = (color - tone) / ((color - tone) ** 2).sum()
    alpha = np.where(_window_maximum(member, MARGIN), (window - tone) @ direction, 0)  # [h, w], 0 outside and 1 inside
    columns = np.arange(x1, x2, dtype=np.float32)[None, :] + 0.5
    rows = np.arange(y1, y2, dtype=np.float32)[:, None] + 0.5
    # Not clipped before the moments: clipping would turn noise around the object into area.
    area = max(float(alpha.sum()), 1.0)  # noise may project to less than nothing
    center_x, center_y = float((alpha * columns).sum()) / area, float((alpha * rows).sum()) / area
    alpha = np.clip(alpha, 0, 1)
    best = ("", 0.0, 0.0, -1.0)
    for shape in SHAPES:
        radius = float(np.sqrt(area / AREAS[shape]))
        y = center_y - CENTROID_DROP.get(shape, 0.0) * radius
        distance = DISTANCES[shape](columns - center_x, rows - y, radius)
        template = np.clip(0.5 - distance, 0, 1)  # as in `world.coverage`
        overlap = max(_overlap(alpha, _blurred(template, sigma)) for sigma in BLURS)
        best = max(best, (shape, y, radius, overlap), key=lambda fit: fit[-1])
    shape, y, radius, overlap = best
    box = (center_x - radius, y - radius, center_x + radius, y + radius)
    return Detection(shape, _nearest(color, _COLOR_NAMES, _COLOR_VALUES), box, overlap)


def _plain_color(window: np.ndarray, member: np.ndarray, tone: np.ndarray) -> np.ndarray:
    """Return the median color of the half of the inner pixels with the most contrast: blur pales a thin object nearly
    everywhere."""
    inner = ~_window_maximum(~member, 1)
    core = window[inner if inner.sum() >= 9 else member]
    contrast = ((core - tone) ** 2).sum(axis=-1)
    return np.median(core[contrast >= np.median(contrast)], axis=0)


def _blurred(template: np.ndarray, sigma: float) -> np.ndarray:
    return (
        template
        if sigma == 0
        else _blur_matrix(len(template), sigma) @ template @ _blur_matrix(template.shape[1], sigma)
    )


@lru_cache(maxsize=256)
def _blur_matrix(size: int, sigma: float) -> np.ndarray:
    """Return [size, size] Gaussian weights; pixels outside the window count as empty."""
    offsets = np.arange(size)[:, None] - np.arange(size)
    reach = np.arange(-int(4 * sigma), int(4 * sigma) + 1)
    total = np.exp(-0.5 * (reach / sigma) ** 2).sum()
    return (np.exp(-0.5 * (offsets / sigma) ** 2) / total).astype(np.float32)


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Compute the soft intersection over union of two coverages: sum of the minima / sum of the maxima."""
    lower = float(np.minimum(a, b).sum())
    return lower / (float(a.sum() + b.sum()) - lower)


def _as_float(image: Image.Image | np.ndarray) -> np.ndarray:
    array = np.asarray(to_rgb(image) if isinstance(image, Image.Image) else image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3:
        raise ValueError(f"an image is uint8 [H, W, 3], not {array.dtype} {list(array.shape)}")
    return array.astype(np.float32)


def _background_tone(pixels: np.ndarray) -> np.ndarray:
    """Return the median color [3] of the border, two pixels wide and nearly free of objects."""
    sides = (pixels[:2], pixels[-2:], pixels[2:-2, :2], pixels[2:-2, -2:])
    return np.median(np.concatenate([side.reshape(-1, 3) for side in sides]), axis=0)


def _nearest(color: np.ndarray, names: list[str], values: np.ndarray) -> str:
    return names[int(((values - color) ** 2).sum(axis=-1).argmin())]


def _window_maximum(values: np.ndarray, radius: int) -> np.ndarray:
    """Compute the maximum over the square window of `radius` around each pixel (outside the image counts as lowest)."""
    result = values
    for axis in (0, 1):
        spread = result.copy()
        for shift in range(1, radius + 1):
            near, far = [slice(None)] * 2, [slice(None)] * 2
            near[axis], far[axis] = slice(shift, None), slice(None, -shift)
            spread[tuple(near)] = np.maximum(spread[tuple(near)], result[tuple(far)])
            spread[tuple(far)] = np.maximum(spread[tuple(far)], result[tuple(near)])
        result = spread
    return result

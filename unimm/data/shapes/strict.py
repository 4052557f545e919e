"""A strict detector for images of the shapes data set: it accepts crisp shapes of plain colors on an empty canvas, and
reports why it refuses anything else.

`unimm.data.shapes.detector` tolerates blur, speckles and ragged edges; this one does not, and has its own geometry and
thresholds. An object is a connected component whose intersection over union with the best-fitting analytic shape is at
least MIN_OVERLAP, pixel by pixel and without blur; its color is the median of its inner pixels and must be close to a
named one. All other foreground together may cover at most MAX_STRAY pixels.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

from unimm.data.shapes.detector import Detection, label_components
from unimm.data.shapes.world import COLORS

MIN_OVERLAP = 0.85  # intersection over union with the analytic shape
MIN_PIXELS = 24  # smaller components count as stray pixels, not objects
MAX_STRAY = 8  # pixels that belong to no object
FAINTEST = 30.0  # RGB distance from the background at which a pixel counts as foreground
FARTHEST_COLOR = 40.0  # RGB distance of an object's color from its name's; the named ones are at least 82 apart
NEIGHBORHOOD = 2  # pixels within which the strongest contrast decides where an edge runs
FIT_STEPS = (1.0, 0.5, 0.25, 0.125)  # step sizes of the hill climbing over center and radius, in pixels

Region = Callable[[np.ndarray, np.ndarray], np.ndarray]

# Whether a point is inside the shape, in units of half the side of its box; y points down.
REGIONS: dict[str, Region] = {
    "circle": lambda x, y: x**2 + y**2 <= 1,
    "square": lambda x, y: (abs(x) <= 1) & (abs(y) <= 1),
    "triangle": lambda x, y: (y <= 1) & (2 * abs(x) <= 1 + y),
    "diamond": lambda x, y: abs(x) + abs(y) <= 1,
    "cross": lambda x, y: ((abs(x) <= 1) & (abs(y) <= 1 / 3)) | ((abs(x) <= 1 / 3) & (abs(y) <= 1)),
    "ring": lambda x, y: (x**2 + y**2 <= 1) & (x**2 + y**2 >= 1 / 4),
}
_NAMES, _VALUES = list(COLORS), np.array(list(COLORS.values()), dtype=np.float64)


@dataclass(frozen=True)
class StrictReading:
    """The result for one image: the accepted `objects`, and the reasons to refuse the whole image, if any."""

    objects: tuple[Detection, ...]
    refusals: tuple[str, ...]

    @property
    def names(self) -> Counter[tuple[str, str]]:
        """Count the occurrences of each (color, shape)."""
        return Counter((item.color, item.shape) for item in self.objects)

    def shows(self, expected: Counter[tuple[str, str]]) -> bool:
        """Return whether the image shows exactly these (color, shape), crisp, and nothing else."""
        return not self.refusals and self.names == expected


def read_strictly(image: Image.Image | np.ndarray) -> StrictReading:
    """Detect the objects of an image (PIL, or uint8 [H, W, 3]), strictly.

    Raises:
        ValueError: the array has another type or layout.
    """
    pixels = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] != 3:
        raise ValueError(f"an image is uint8 [H, W, 3], not {pixels.dtype} {list(pixels.shape)}")
    pixels = pixels.astype(np.float64)
    frame = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    contrast = np.linalg.norm(pixels - np.median(frame, axis=0), axis=-1)  # [H, W]
    foreground = contrast > np.maximum(FAINTEST, _strongest_nearby(contrast) / 2)
    labels, count = label_components(foreground)
    objects, refusals, strays = list[Detection](), list[str](), 0
    for index in range(1, count + 1):
        member = labels == index
        if (area := int(member.sum())) < MIN_PIXELS:
            strays += area
            continue
        found = _read(pixels, member)
        if isinstance(found, str):
            refusals.append(found)
        else:
            objects.append(found)
    if strays > MAX_STRAY:
        refusals.append(f"{strays} pixels belong to no object, more than {MAX_STRAY}")
    return StrictReading(tuple(objects), tuple(refusals))


def _strongest_nearby(contrast: np.ndarray) -> np.ndarray:
    """Return the maximum of [H, W] over a square window around each pixel."""
    side = 2 * NEIGHBORHOOD + 1
    return sliding_window_view(np.pad(contrast, NEIGHBORHOOD), (side, side)).max(axis=(-2, -1))


def _read(pixels: np.ndarray, member: np.ndarray) -> Detection | str:
    """Return the object of a component, or the reason to refuse it."""
    (x, y, radius), shape, overlap = _best_fit(member)
    color, distance = _name_of(np.median(pixels[_inner(member)], axis=0))
    place = f"near ({x:.0f}, {y:.0f})"
    if overlap < MIN_OVERLAP:
        return f"the object {place} overlaps a {shape} by {overlap:.2f}, less than {MIN_OVERLAP}"
    if distance > FARTHEST_COLOR:
        return f"the {shape} {place} is {distance:.0f} from {color}, more than {FARTHEST_COLOR:.0f}"
    return Detection(shape, color, (x - radius, y - radius, x + radius, y + radius), overlap)


def _inner(member: np.ndarray) -> np.ndarray:
    """Return the pixels whose four neighbors are members too, or all if there are none: edges mix in the background."""
    padded = np.pad(member, 1)
    inner = member & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return inner if inner.any() else member


def _name_of(color: np.ndarray) -> tuple[str, float]:
    distances = np.linalg.norm(_VALUES - color, axis=-1)
    return _NAMES[int(distances.argmin())], float(distances.min())


def _best_fit(member: np.ndarray) -> tuple[tuple[float, float, float], str, float]:
    """Fit analytic shapes to a component [H, W]; return (x, y, radius), name and overlap of the best one."""
    rows, columns = np.nonzero(member)
    y1, y2, x1, x2 = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
    start = ((x1 + x2) / 2, (y1 + y2) / 2, max(x2 - x1, y2 - y1) / 2)
    margin = 3
    top, left = max(y1 - margin, 0), max(x1 - margin, 0)
    window = member[top : y2 + margin, left : x2 + margin]
    ys = np.arange(top, top + window.shape[0])[:, None] + 0.5
    xs = np.arange(left, left + window.shape[1])[None, :] + 0.5

    def overlap(region: Region, x: float, y: float, radius: float) -> float:
        covered = region((xs - x) / radius, (ys - y) / radius)
        return float((covered & window).sum() / (covered | window).sum())

    first = sorted(REGIONS, key=lambda name: -overlap(REGIONS[name], *start))
    fits = [_climb(lambda *place, region=REGIONS[name]: overlap(region, *place), start) for name in first[:3]]
    (place, score), name = max(zip(fits, first, strict=False), key=lambda fit: fit[0][1])
    return place, name, score


def _climb(
    overlap: Callable[..., float], start: tuple[float, float, float]
) -> tuple[tuple[float, float, float], float]:
    """Maximize the overlap over (x, y, radius) by hill climbing with decreasing steps; return both."""
    place, best = start, overlap(*start)
    for step in FIT_STEPS:
        moved = True
        while moved:
            moved = False
            for axis in range(3):
                for change in (-step, step):
                    x, y, radius = (value + change * (axis == other) for other, value in enumerate(place))
                    if radius > 1 and (score := overlap(x, y, radius)) > best:
                        place, best, moved = (x, y, radius), score, True
    return place, best

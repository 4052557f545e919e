"""Scenes of the shapes data set: sampling and rendering.

Objects are signed distance functions, so edges are anti-aliased at any position and size (nothing snaps to a patch
grid), and an image is a pure function of its `Scene`. Lengths are in pixels; x points right and y down, and the center
of the top-left pixel is (0.5, 0.5).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from unimm.errors import UserError

IMAGE_SIZE = 64
MIN_RADIUS, MAX_RADIUS = 8.0, 14.0
MIN_GAP = 3.0  # free pixels between the boxes of two objects; MIN_BORDER: between a box and the image border
MIN_BORDER = 1.0
# Four large objects do not fit into 64 pixels: the more there are, the lower the largest radius.
LARGEST_RADIUS = {1: 14.0, 2: 14.0, 3: 12.5, 4: 11.0}

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (250, 220, 50),
    "green": (45, 160, 70),
    "blue": (45, 95, 215),
    "purple": (135, 60, 170),
    "pink": (245, 140, 190),
    "brown": (120, 72, 35),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (246, 246, 246),
    "gray": (128, 128, 128),
    "black": (16, 16, 16),
    "cream": (238, 225, 195),
}

# Pairs that no training caption or conversation ever names or shows: they measure compositional generalization.
WITHHELD: frozenset[tuple[str, str]] = frozenset(
    {
        ("red", "triangle"),
        ("blue", "ring"),
        ("green", "circle"),
        ("yellow", "cross"),
        ("purple", "square"),
        ("pink", "diamond"),
    }
)

Distance = Callable[[np.ndarray, np.ndarray, float], np.ndarray]


def _circle(dx: np.ndarray, dy: np.ndarray, r: float) -> np.ndarray:
    return np.hypot(dx, dy) - r


def _square(dx: np.ndarray, dy: np.ndarray, r: float) -> np.ndarray:
    return np.maximum(np.abs(dx), np.abs(dy)) - r


def _triangle(dx: np.ndarray, dy: np.ndarray, r: float) -> np.ndarray:
    """Return the distance to an isosceles triangle, apex up, that fills its box."""
    return np.maximum(dy - r, (2 * np.abs(dx) - dy - r) / np.sqrt(5.0))


def _diamond(dx: np.ndarray, dy: np.ndarray, r: float) -> np.ndarray:
    return (np.abs(dx) + np.abs(dy) - r) / np.sqrt(2.0)


def _cross(dx: np.ndarray, dy: np.ndarray, r: float) -> np.ndarray:
    """Return the distance to a plus sign whose arms are a third of the box wide."""
    ax, ay = np.abs(dx), np.abs(dy)
    return np.minimum(np.maximum(ax - r, ay - r / 3), np.maximum(ax - r / 3, ay - r))


def _ring(dx: np.ndarray, dy: np.ndarray, r: float) -> np.ndarray:
    """Return the distance to a circle with a hole of half its radius."""
    distance = np.hypot(dx, dy)
    return np.maximum(distance - r, r / 2 - distance)


DISTANCES: dict[str, Distance] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "diamond": _diamond,
    "cross": _cross,
    "ring": _ring,
}
SHAPES: tuple[str, ...] = tuple(DISTANCES)


@dataclass(frozen=True)
class SceneObject:
    """An object: `x`, `y` are its center and `radius` is half the side of its box, in pixels."""

    shape: str
    color: str
    x: float
    y: float
    radius: float

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Return (x1, y1, x2, y2) in pixels."""
        return (self.x - self.radius, self.y - self.radius, self.x + self.radius, self.y + self.radius)


@dataclass(frozen=True)
class Scene:
    objects: tuple[SceneObject, ...]
    background: str
    image_size: int = IMAGE_SIZE


def coverage(shape: str, dx: np.ndarray, dy: np.ndarray, radius: float) -> np.ndarray:
    """Compute the share of each pixel that the shape covers, in [0, 1], for pixel centers at offsets `dx`, `dy` from
    the shape's center."""
    return np.clip(0.5 - DISTANCES[shape](dx, dy, radius), 0.0, 1.0)


def render_array(scene: Scene) -> np.ndarray:
    """Render the scene as uint8 RGB, [H, W, 3]."""
    size = scene.image_size
    canvas = np.empty((size, size, 3), dtype=np.float32)
    canvas[:] = BACKGROUNDS[scene.background]
    for obj in scene.objects:
        x1, y1 = (max(0, int(np.floor(v)) - 1) for v in obj.box[:2])
        x2, y2 = (min(size, int(np.ceil(v)) + 1) for v in obj.box[2:])
        dx = np.arange(x1, x2, dtype=np.float32)[None, :] + 0.5 - obj.x
        dy = np.arange(y1, y2, dtype=np.float32)[:, None] + 0.5 - obj.y
        alpha = coverage(obj.shape, dx, dy, obj.radius)[..., None]
        window = canvas[y1:y2, x1:x2]
        window += alpha * (np.asarray(COLORS[obj.color], dtype=np.float32) - window)
    return np.rint(canvas).astype(np.uint8)


def render(scene: Scene) -> Image.Image:
    """Render the scene as a square RGB image of side `scene.image_size`."""
    return Image.fromarray(render_array(scene))


def place(rng: np.random.Generator, count: int, image_size: int = IMAGE_SIZE) -> list[tuple[float, float, float]]:
    """Sample `count` (x, y, radius) whose boxes keep MIN_GAP from each other and MIN_BORDER from the border."""
    if count not in LARGEST_RADIUS:
        raise UserError(f"A scene holds 1 to {max(LARGEST_RADIUS)} objects, not {count}.")
    while True:  # rejection sampling: every count is accepted with a probability far above zero
        placed: list[tuple[float, float, float]] = []
        radii = rng.uniform(MIN_RADIUS, LARGEST_RADIUS[count], size=count)
        for radius in np.sort(radii)[::-1]:
            low, high = radius + MIN_BORDER, image_size - radius - MIN_BORDER
            for x, y in rng.uniform(low, high, size=(12, 2)):
                if all(max(abs(x - a), abs(y - b)) >= radius + r + MIN_GAP for a, b, r in placed):
                    placed.append((float(x), float(y), float(radius)))
                    break
            else:
                break
        if len(placed) == count:
            return [placed[i] for i in rng.permutation(count)]


def allowed_pairs(allow_withheld: bool) -> list[tuple[str, str]]:
    """List the (color, shape) pairs that may be sampled."""
    return [(c, s) for c in COLORS for s in SHAPES if allow_withheld or (c, s) not in WITHHELD]


_PAIRS = {flag: allowed_pairs(flag) for flag in (False, True)}


def compose(rng: np.random.Generator, pairs: Sequence[tuple[str, str]], background: str | None = None) -> Scene:
    """Sample a scene of exactly these (color, shape) pairs, at free positions."""
    spots = place(rng, len(pairs))
    tone = background or str(rng.choice(list(BACKGROUNDS)))
    objects = (SceneObject(shape, color, x, y, r) for (color, shape), (x, y, r) in zip(pairs, spots, strict=True))
    return Scene(tuple(objects), tone)


def sample_scene(rng: np.random.Generator, *, num_objects: int | None = None, allow_withheld: bool = False) -> Scene:
    """Sample a scene of 1 to 4 objects (or `num_objects`); withheld pairs appear only with `allow_withheld`."""
    count = int(rng.integers(1, 5)) if num_objects is None else num_objects
    pool = _PAIRS[allow_withheld]
    return compose(rng, [pool[i] for i in rng.integers(len(pool), size=count)])

"""The analytic detector on rendered scenes, and on what a tokenizer may make of them."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from unimm.data.shapes import COLORS, SHAPES, Scene, SceneObject, render, render_array, sample_scene
from unimm.data.shapes.detector import Detection, detect, label_components
from unimm.data.shapes.world import BACKGROUNDS

Damage = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def scenes(count: int) -> list[Scene]:
    rng = np.random.default_rng(11)
    return [sample_scene(rng, allow_withheld=True) for _ in range(count)]


def is_exact(scene: Scene, found: list[Detection], *, tolerance: float) -> bool:
    """The same objects with multiplicity, each with a box whose sides are all within `tolerance` pixels."""
    left = list(found)
    for item in scene.objects:
        for candidate in left:
            same = (candidate.shape, candidate.color) == (item.shape, item.color)
            if same and np.abs(np.subtract(candidate.box, item.box)).max() <= tolerance:
                left.remove(candidate)
                break
        else:
            return False
    return not left


def share_exact(damage: Damage, *, count: int, tolerance: float = 1.5) -> float:
    rng = np.random.default_rng(0)
    right = []
    for scene in scenes(count):
        pixels = damage(render_array(scene).astype(np.float64), rng)
        image = np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
        right.append(is_exact(scene, detect(image), tolerance=tolerance))
    return float(np.mean(right))


def blur(sigma: float) -> Damage:
    return lambda pixels, rng: ndimage.gaussian_filter(pixels, (sigma, sigma, 0))


def specks(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Four loud speckles of 4 x 4 pixels."""
    pixels = pixels.copy()
    for y, x in rng.integers(0, 60, size=(4, 2)):
        pixels[y : y + 4, x : x + 4] += rng.normal(0, 40, size=3)
    return pixels


def test_clean_scenes_are_read_exactly() -> None:
    assert share_exact(lambda pixels, rng: pixels, count=400, tolerance=0.5) >= 0.995


@pytest.mark.parametrize(
    ("damage", "least"),
    [
        (lambda pixels, rng: pixels + rng.normal(0, 10, pixels.shape), 0.995),
        (blur(1.0), 0.995),
        (blur(1.5), 0.98),
        (blur(2.0), 0.8),
        (lambda pixels, rng: blur(1.0)(pixels, rng) + rng.normal(0, 10, pixels.shape), 0.98),
        (lambda pixels, rng: pixels + ndimage.gaussian_filter(rng.normal(0, 60, pixels.shape), (2, 2, 0)), 0.97),
        (lambda pixels, rng: 0.85 * pixels + 15, 0.98),
        (specks, 0.97),
    ],
    ids=["noise", "blur 1", "blur 1.5", "blur 2", "blur and noise", "ripples", "faded", "specks"],
)
def test_soft_and_speckled_images(damage: Damage, least: float) -> None:
    assert share_exact(damage, count=100) >= least


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_every_kind_of_object_on_every_background(background: str) -> None:
    for shape in SHAPES:
        for color in COLORS:
            scene = Scene((SceneObject(shape, color, 31.3, 30.6, 8.2),), background)
            (found,) = detect(render(scene))
            assert (found.shape, found.color) == (shape, color)
            assert found.score > 0.95


def test_an_empty_image_holds_nothing() -> None:
    assert detect(render_array(Scene((), "cream"))) == []


def test_equal_objects_are_counted() -> None:
    objects = tuple(SceneObject("ring", "red", x, y, 9.0) for x, y in ((14, 14), (14, 45), (45, 30)))
    found = detect(render(Scene(objects, "white")))
    assert Counter((item.shape, item.color) for item in found) == {("ring", "red"): 3}
    assert [round(item.box[1]) for item in found] == [5, 21, 36]  # from top to bottom


def test_thresholds() -> None:
    scene = Scene((SceneObject("square", "blue", 30, 30, 8.0),), "gray")
    assert detect(render(scene), min_area=300) == []
    assert detect(render(scene), min_score=1.01) == []
    pixels = render_array(scene)
    pixels[20:24, 50:54] = 0  # 16 pixels: a speck, unless asked for
    assert len(detect(pixels)) == 1
    assert len(detect(pixels, min_area=10)) == 2


def test_a_scrawl_is_no_shape() -> None:
    pixels = np.full((64, 64, 3), 246, dtype=np.uint8)
    pixels[10:12, 5:60] = pixels[10:60, 5:7] = (220, 40, 40)  # a thin right angle, 206 pixels
    assert detect(pixels) == []


def test_rule_input() -> None:
    found = Detection("ring", "red", (1.0, 2.0, 3.0, 4.0), 0.9)
    assert found.as_rule_input() == {"label": "ring", "color": "red", "box": (1.0, 2.0, 3.0, 4.0), "score": 0.9}


@pytest.mark.parametrize("density", [0.0, 0.3, 0.5, 0.6, 0.9, 1.0])
def test_components_are_those_of_scipy(density: float) -> None:
    mask = np.random.default_rng(3).random((37, 53)) < density
    labels, count = label_components(mask)
    expected, expected_count = ndimage.label(mask)
    assert count == expected_count
    # the same partition: as many pairs of labels as labels
    assert len(np.unique(np.stack([labels[mask], expected[mask]]), axis=1).T) == count
    assert not labels[~mask].any()


def test_images_of_other_modes_and_bad_arrays() -> None:
    scene = sample_scene(np.random.default_rng(0))
    assert detect(render(scene).convert("RGBA")) == detect(render_array(scene))
    assert detect(Image.new("L", (64, 64), 246)) == []
    for wrong in (np.zeros((64, 64, 3)), np.zeros((3, 64, 64), np.uint8), np.zeros((64, 64), np.uint8)):
        with pytest.raises(ValueError, match=r"an image is uint8 \[H, W, 3\]"):
            detect(wrong)

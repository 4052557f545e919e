"""The strict detector: right on clean scenes, and what it refuses that the first one forgives."""

from collections import Counter

import numpy as np
import pytest
from scipy import ndimage

from eval.wobble import measure, refused_from, wobbling_image
from unimm.data.shapes import Scene, SceneObject, render, render_array, sample_scene
from unimm.data.shapes.detector import detect
from unimm.data.shapes.strict import MAX_STRAY, REGIONS, read_strictly
from unimm.data.shapes.world import BACKGROUNDS, COLORS, DISTANCES


def objects_of(scene: Scene) -> Counter[tuple[str, str]]:
    return Counter((item.color, item.shape) for item in scene.objects)


def scene_of(seed: int) -> Scene:
    return sample_scene(np.random.default_rng(seed), allow_withheld=True)


def one(shape: str, color: str = "red", background: str = "white", radius: float = 11.0) -> Scene:
    return Scene((SceneObject(shape, color, 30.3, 33.6, radius),), background)


def test_clean_scenes_are_accepted_from_many_seeds() -> None:
    scenes = [scene_of(seed) for seed in range(300)]
    right = [read_strictly(render(scene)).shows(objects_of(scene)) for scene in scenes]
    assert np.mean(right) >= 0.99


@pytest.mark.parametrize("shape", sorted(REGIONS))
def test_regions_are_those_that_are_rendered(shape: str) -> None:
    """The detector's own geometry agrees with the renderer's distances, which it does not use."""
    x, y = np.random.default_rng(0).uniform(-1.2, 1.2, (2, 20_000))
    distance = DISTANCES[shape](x, y, 1.0)
    clear = np.abs(distance) > 1e-6
    assert (REGIONS[shape](x, y) == (distance < 0))[clear].all()


def test_boxes_are_where_the_objects_are() -> None:
    for seed in range(60):
        scene = scene_of(seed)
        boxes = [item.box for item in read_strictly(render(scene)).objects]
        for item in scene.objects:
            assert min(np.abs(np.subtract(item.box, box)).max() for box in boxes) <= 1.25


@pytest.mark.parametrize("color", sorted(COLORS))
@pytest.mark.parametrize("background", sorted(BACKGROUNDS))
def test_every_color_on_every_background(color: str, background: str) -> None:
    for shape in REGIONS:
        scene = one(shape, color, background)
        assert read_strictly(render(scene)).shows(objects_of(scene))


def share(damage: str, count: int = 100) -> float:
    rng, right = np.random.default_rng(3), 0
    for seed in range(count):
        scene = scene_of(seed)
        pixels = render_array(scene).astype(np.float64)
        if damage == "noise":
            pixels += rng.normal(0, 5, pixels.shape)
        elif damage == "blur":
            pixels = ndimage.gaussian_filter(pixels, (0.7, 0.7, 0))
        elif damage == "faded":
            pixels = 0.92 * pixels + 10
        elif damage == "patches":  # what a tokenizer of patches paints that has lost the edges inside them
            pixels = pixels.reshape(16, 4, 16, 4, 3).mean(axis=(1, 3)).repeat(4, axis=0).repeat(4, axis=1)
        right += read_strictly(np.clip(np.rint(pixels), 0, 255).astype(np.uint8)).shows(objects_of(scene))
    return right / count


@pytest.mark.parametrize("damage", ["noise", "blur", "faded"])
def test_soft_and_faint_damage_is_accepted(damage: str) -> None:
    assert share(damage) >= 0.9


def test_edges_that_follow_patches_are_refused() -> None:
    assert share("patches", 60) <= 0.05


@pytest.mark.slow
def test_wobbling_edges_are_refused_long_before_the_first_detector_does() -> None:
    measured = measure((0.0, 0.4, 0.6, 1.0, 1.5), scenes=60)
    strict, first = refused_from(measured, "strict"), refused_from(measured, "first")
    assert (measured[0].strict, measured[0].first) == (1, 1)
    assert [row.strict for row in measured] == sorted((row.strict for row in measured), reverse=True)
    assert strict is not None
    assert 0.3 < strict < 0.6  # pixels: the median displacement of an edge at which half of the images are refused
    assert first is not None
    assert first > 1.5 * strict
    print(f"half of the images are refused at {strict:.2f} px, by the first detector at {first:.2f} px")


def test_the_wobble_is_what_it_says() -> None:
    """A square's straight upper edge is moved by the field: its coverage column by column tells by how much."""
    scene = Scene((SceneObject("square", "blue", 32, 32.25, 14),), "white")
    still, none = wobbling_image(scene, np.random.default_rng(0), 0.0)
    assert np.array_equal(still, render_array(scene))
    assert set(none) == {0.0}
    moved, displaced = wobbling_image(scene, np.random.default_rng(0), 0.8)
    heights = [
        (np.abs(image.astype(float) - 246).sum(-1) / 383).clip(0, 1)[14:22, 20:44].sum(0) for image in (still, moved)
    ]
    assert np.median(np.abs(heights[1] - heights[0])) == pytest.approx(np.median(displaced), abs=0.25)


@pytest.mark.parametrize(("name", "pixels"), [("a few specks", MAX_STRAY // 2), ("many specks", 3 * MAX_STRAY)])
def test_nothing_else_may_be_on_the_canvas(name: str, pixels: int) -> None:
    scene = one("circle")
    image = render_array(scene)
    for index in range(pixels):
        image[3 + 2 * (index // 28), 3 + 2 * (index % 28)] = (20, 20, 20)
    read = read_strictly(image)
    assert read.shows(objects_of(scene)) == (pixels <= MAX_STRAY)
    assert bool(read.refusals) == (pixels > MAX_STRAY)
    if read.refusals:
        assert read.refusals == (f"{pixels} pixels belong to no object, more than {MAX_STRAY}",)


def test_a_blob_and_a_foreign_color_are_refused() -> None:
    blob = np.full((64, 64, 3), 246, np.uint8)
    blob[20:40, 20:30], blob[20:30, 20:36] = (220, 40, 40), (220, 40, 40)
    assert detect(blob)  # the first detector finds a shape in it
    assert "overlaps" in read_strictly(blob).refusals[0]
    foreign = np.full((64, 64, 3), 246, np.uint8)
    foreign[20:40, 20:40] = (120, 220, 220)
    assert "the square near (30, 30) is" in read_strictly(foreign).refusals[0]


@pytest.mark.parametrize("value", [0, 128, 255])
def test_an_image_of_one_color_holds_nothing(value: int) -> None:
    read = read_strictly(np.full((64, 64, 3), value, np.uint8))
    assert (read.objects, read.refusals) == ((), ())
    assert not read.shows(Counter({("red", "circle"): 1}))


def test_other_arrays_are_refused() -> None:
    with pytest.raises(ValueError, match="an image is uint8"):
        read_strictly(np.zeros((64, 64), np.uint8))

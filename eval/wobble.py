"""Measure how irregular edges may be for the two detectors of the shapes data set.

    python eval/wobble.py --json runs/wobble.json

Scenes are rendered with randomly displaced edges: a smooth random field is added to the signed distance of each object,
so that its outline wobbles while color, position and size stay. Prints the median displacement in pixels, the share of
images that the first and the strict detector recognize correctly, and the displacement at which each share falls below
one half.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from unimm.data.shapes import COLORS, Scene, sample_scene
from unimm.data.shapes.detector import detect
from unimm.data.shapes.strict import read_strictly
from unimm.data.shapes.world import BACKGROUNDS, DISTANCES
from unimm.errors import UserError, run_main
from unimm.runs.provenance import git_commit
from unimm.runs.report import Report

SMOOTHNESS = 1.5  # pixels: sigma of the Gaussian that makes neighboring displacements alike
AMPLITUDES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.5, 2.0, 3.0)  # standard deviations of the displacement, in pixels


class Accepted(NamedTuple):
    """The median displacement of the edges in pixels, and the share of images that each detector gets right."""

    wobble: float
    first: float
    strict: float


def wobbling_image(scene: Scene, rng: np.random.Generator, amplitude: float) -> tuple[np.ndarray, list[float]]:
    """Return the scene as uint8 [H, W, 3] with wobbling edges, and the displacement of every edge pixel."""
    size = scene.image_size
    canvas = np.empty((size, size, 3))
    canvas[:] = BACKGROUNDS[scene.background]
    centres, displaced = np.arange(size) + 0.5, list[float]()
    for item in scene.objects:
        distance = DISTANCES[item.shape](centres[None, :] - item.x, centres[:, None] - item.y, item.radius)
        field = amplitude * _smooth_noise(rng, size)
        near = distance < 4  # keeps the field from painting pixels far outside the object
        alpha = (np.clip(0.5 - distance - field, 0, 1) * near)[..., None]
        canvas += alpha * (np.array(COLORS[item.color]) - canvas)
        displaced += np.abs(field[np.abs(distance) < 0.5]).tolist()
    return np.rint(canvas).astype(np.uint8), displaced


def _smooth_noise(rng: np.random.Generator, size: int) -> np.ndarray:
    """Return a smooth random field [size, size] of mean 0 and standard deviation 1."""
    offsets = np.arange(size)[:, None] - np.arange(size)
    kernel = np.exp(-0.5 * (offsets / SMOOTHNESS) ** 2)
    field = kernel @ rng.standard_normal((size, size)) @ kernel
    normalized: np.ndarray = (field - field.mean()) / field.std()
    return normalized


def measure(amplitudes: Sequence[float] = AMPLITUDES, scenes: int = 200, seed: int = 0) -> list[Accepted]:
    """Return, per amplitude, how often the two detectors recognize all objects of `scenes` wobbling images."""
    found = []
    for amplitude in amplitudes:
        rng, first, strict, displaced = np.random.default_rng(seed), 0, 0, list[float]()
        for _ in range(scenes):
            scene = sample_scene(rng, allow_withheld=True)
            expected = Counter((item.color, item.shape) for item in scene.objects)
            image, moved = wobbling_image(scene, rng, amplitude)
            first += Counter((item.color, item.shape) for item in detect(image)) == expected
            strict += read_strictly(image).shows(expected)
            displaced += moved
        found.append(Accepted(float(np.median(displaced)), first / scenes, strict / scenes))
    return found


def refused_from(measured: Sequence[Accepted], detector: str) -> float | None:
    """Return the displacement at which a detector (`first` or `strict`) accepts half of the images, interpolated
    linearly between two measurements; None if it accepts more throughout."""
    for below, above in zip(measured, measured[1:], strict=False):
        high, low = getattr(below, detector), getattr(above, detector)
        if high >= 0.5 > low:
            return below.wobble + (above.wobble - below.wobble) * (high - 0.5) / (high - low)
    return None


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=200, help="images of each amplitude; default %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="write the result, - for standard output")
    arguments = parser.parse_args(argv)
    if arguments.scenes < 1:
        raise UserError(f"--scenes is {arguments.scenes}; it must be at least 1.")
    report = Report(arguments.json)
    with report.timed("wobble"):
        measured = measure(scenes=arguments.scenes, seed=arguments.seed)
    report.say(f"{'wobble (px)':>12} {'first':>7} {'strict':>7}")
    for row in measured:
        report.say(f"{row.wobble:12.2f} {row.first:7.3f} {row.strict:7.3f}")
    limits = {name: refused_from(measured, name) for name in ("first", "strict")}
    for name, limit in limits.items():
        shown = "more than was measured" if limit is None else f"{limit:.2f} px"
        report.say(f"the {name} detector accepts half of the images at a median displacement of {shown}")
    report.add(rows=[row._asdict() for row in measured], half_accepted_at=limits, smoothness=SMOOTHNESS)
    report.add(scenes=arguments.scenes, seed=arguments.seed, commit=git_commit())
    report.write()


if __name__ == "__main__":
    sys.exit(run_main(main, name="wobble"))

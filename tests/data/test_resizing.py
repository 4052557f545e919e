"""Cutting and padding: ordinary images as Pillow does it in two plain steps, strips within their own pixels."""

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from unimm.data import resizing
from unimm.data.resizing import adm_crop, crop
from unimm.evaluation.geneval.color_votes import prepare_view
from unimm.evaluation.runs.protocols import torchvision_crop
from unimm.tokenizer import ImageTokenizerProcessor

BICUBIC = Image.Resampling.BICUBIC
STRIPS = [(100_000, 1), (1, 100_000), (60_000, 20), (20, 60_000)]


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def processor(size: int, *, pad: bool) -> ImageTokenizerProcessor:
    made = ImageTokenizerProcessor(
        size={"height": size, "width": size}, image_mean=[0.5, 0.25, 0.75], image_std=[0.5] * 3
    )
    made.pad_to_square = pad
    return made


def pixels(processor: ImageTokenizerProcessor, image: Image.Image) -> np.ndarray:
    """The processor's values in levels of 255, [3, H, W]."""
    values = processor(images=image, return_tensors="np")["pixel_values"][0]
    mean, std = (np.array(each)[:, None, None] for each in (processor.image_mean, processor.image_std))
    return (values * std + mean) * 255


@contextmanager
def memory(megabytes: int) -> Iterator[None]:
    """No more than so much beside what is in use now."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + megabytes * 2**20, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def plain_crop(image: Image.Image, size: int, offset: tuple[float, float]) -> np.ndarray:
    """The whole image resized, then cut."""
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    left, top = round(offset[0] * (width - size)), round(offset[1] * (height - size))
    return np.asarray(image.resize((width, height), BICUBIC))[top : top + size, left : left + size]


def plain_square(image: Image.Image, size: int) -> np.ndarray:
    """The whole square made, then resized."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), (127, 63, 191))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.asarray(square.resize((size, size), BICUBIC))


@pytest.mark.parametrize("size", STRIPS)
@pytest.mark.parametrize(
    "cut",
    [
        lambda image: crop(image, 64, (0.3, 0.7)),
        lambda image: adm_crop(image, 64),
        lambda image: torchvision_crop(image, 64),
        lambda image: prepare_view(image, 64),
        lambda image: processor(64, pad=True)(images=image, return_tensors="np"),
        lambda image: processor(64, pad=False)(images=image, return_tensors="np"),
    ],
    ids=["training", "adm", "torchvision", "clip", "padded", "stretched"],
)
def test_a_strip_takes_memory_for_its_own_pixels(size: tuple[int, int], cut: Callable[[Image.Image], object]) -> None:
    image = Image.new("RGB", size, "navy")
    with memory(128):
        cut(image)


@pytest.mark.parametrize("size", [(40, 30), (301, 77), (64, 64), (33, 200), (700, 20)])
def test_ordinary_images_are_cut_and_padded_as_they_always_were(size: tuple[int, int]) -> None:
    image = noise(*size)
    for offset in ((0.5, 0.5), (0.2, 0.9)):
        assert np.array_equal(np.asarray(crop(image, 32, offset)), plain_crop(image, 32, offset))
    assert np.abs(pixels(processor(32, pad=True), image) - plain_square(image, 32).transpose(2, 0, 1)).max() < 1e-4


@contextmanager
def nothing_whole() -> Iterator[None]:
    """Every image is a strip."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resizing, "WHOLE_PIXELS", 0)
        patch.setattr(resizing, "WHOLE_FACTOR", 0)
        yield


@settings(deadline=None, max_examples=50)
@given(
    width=st.integers(1, 90),
    height=st.integers(200, 900),
    turned=st.booleans(),
    size=st.integers(1, 50),
    offset=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_a_strip_becomes_what_the_whole_way_makes_of_it(
    width: int, height: int, turned: bool, size: int, offset: tuple[float, float]
) -> None:
    image = noise(height, width) if turned else noise(width, height)
    with nothing_whole():
        cut, padded = np.asarray(crop(image, size, offset)), pixels(processor(size, pad=True), image)
    assert np.abs(cut.astype(int) - plain_crop(image, size, offset)).max() <= 1
    assert np.abs(padded - plain_square(image, size).transpose(2, 0, 1)).max() <= 1.001


def test_a_real_strip_becomes_what_the_whole_way_makes_of_it() -> None:
    image = noise(3, 3000)
    assert resizing.is_strip(image.size, (3000, 3000))
    found = pixels(processor(48, pad=True), image)
    assert np.abs(found - plain_square(image, 48).transpose(2, 0, 1)).max() <= 1.001
    wide = noise(3000, 3)
    assert np.abs(np.asarray(crop(wide, 64)).astype(int) - plain_crop(wide, 64, (0.5, 0.5))).max() <= 1

"""The target of a reconstruction: the input's pixels, at the decoder's size."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from unimm.training.tokenizer.reconstruct import target_pixels


@pytest.mark.parametrize(("height", "width", "output_size"), [(32, 32, 16), (32, 48, 24), (32, 32, 40), (32, 32, 32)])
def test_targets_of_another_size_are_pillows_bicubic(height: int, width: int, output_size: int) -> None:
    tokenizer: Any = SimpleNamespace(
        config=SimpleNamespace(image_size=32, output_size=output_size), denormalize=lambda values: values / 2 + 0.5
    )
    pixels = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    found = target_pixels(tokenizer, pixels * 2 - 1)
    size = (width * output_size // 32, height * output_size // 32)
    for image, row in zip(found.flatten(0, 1), pixels.flatten(0, 1), strict=True):
        expected = np.asarray(Image.fromarray(row.numpy()).resize(size, Image.Resampling.BICUBIC)).clip(0, 1)
        np.testing.assert_allclose(image.numpy(), expected, rtol=0, atol=1e-5)

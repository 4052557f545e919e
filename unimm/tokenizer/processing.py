"""`ImageTokenizerProcessor`: convert images to `pixel_values` and back, with PIL only (no torchvision)."""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import SiglipImageProcessorPil

from unimm.data.arrays import eight_bits, is_array, is_unit, rgb_array, to_numpy
from unimm.data.images import each_image, read_image
from unimm.data.resizing import is_strip, padded_strip
from unimm.errors import UserError


class ImageTokenizerProcessor(SiglipImageProcessorPil):
    """An image processor to normalized pixel_values [B, 3, H, W] at the tokenizer's size, and back by `postprocess`.

    Accepts whatever `unimm.data.images.read_image` accepts, single or in nested lists; arrays and tensors are processed
    as by SigLIP's processor. Both sides are resized to the tokenizer's size (bicubic), also as there. With
    `pad_to_square` an image is first padded to a square with the mean color, as in LLaVA-1.5 (`image_aspect_ratio pad`,
    https://arxiv.org/abs/2310.03744); the setting is saved, because inference must match training.
    """

    model_input_names = ["pixel_values"]
    pad_to_square = False

    @classmethod
    def for_tokenizer(cls, config: Any) -> "ImageTokenizerProcessor":
        """Build the processor for an `ImageTokenizerConfig`."""
        size = {"height": config.image_size, "width": config.image_size}
        return cls(
            size=size,
            image_mean=list(config.image_mean),
            image_std=list(config.image_std),
            resample=3,
            do_convert_rgb=True,
        )

    def fetch_images(self, image_url_or_urls: Any) -> list[Any]:
        """Return a flat list of upright RGB images; arrays keep their scale, which `process_image` detects."""
        found = each_image(image_url_or_urls)
        return [_with_channels(to_numpy(each)) if is_array(each) else read_image(each) for each in found]

    def process_image(self, image: Any, *, input_data_format: Any = None, **kwargs: Any) -> np.ndarray:
        """Return one image as [3, H, W] before resizing: 8 bits, or floats in [0, 1] if it was given as such."""
        array = rgb_array(image, input_data_format) if is_array(image) else np.asarray(read_image(image))  # [H, W, 3]
        if is_unit(array) and kwargs.get("do_rescale"):
            warnings.warn(
                "The image's values lie in [0, 1] and are divided by 255 once more, as transformers does: pass "
                "do_rescale=False.",
                stacklevel=2,
            )
        if self.pad_to_square:
            array = self._padded(array, **kwargs)
        return np.moveaxis(array, -1, 0)

    def _padded(
        self, array: np.ndarray, *, do_resize: bool | None = None, size: Any = None, resample: Any = None, **_: Any
    ) -> np.ndarray:
        """Pad [H, W, 3] to a square with the mean color; a strip is padded directly at the final size."""
        color = tuple(int(255 * channel) for channel in self.image_mean)  # LLaVA's rounding
        side = max(array.shape[:2])
        if not (do_resize and size and size.height and is_strip(array.shape[:2], (side, side))):
            return _squared(array, [level / 255 for level in color] if is_unit(array) else color)
        strip = Image.fromarray(np.ascontiguousarray(eight_bits(array)))
        square = np.asarray(padded_strip(strip, (size.width, size.height), color, Image.Resampling(resample)))
        return square / 255 if is_unit(array) else square

    def postprocess(self, pixels: Tensor) -> list[Image.Image]:
        """Return pixels [B, 3, H, W] in [0, 1] as RGB images, clamped and rounded to 8 bits."""
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise UserError(f"postprocess takes pixels [B, 3, H, W], not {list(pixels.shape)}.")
        array = (pixels.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(np.ascontiguousarray(image)) for image in array]


def _with_channels(array: np.ndarray) -> np.ndarray:
    """Return a gray image [H, W] as [1, H, W], which transformers counts as one image."""
    return array[None] if array.ndim == 2 else array


def _squared(image: np.ndarray, color: Sequence[float]) -> np.ndarray:
    """Center the image [H, W, 3] in a square of the color; an odd row is added at the bottom."""
    height, width, _ = image.shape
    side = max(height, width)
    square = np.empty((side, side, 3), dtype=image.dtype)
    square[:] = np.array(color)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = image
    return square


def image_disagreements(image_processor: Any, config: Any) -> Iterator[str]:
    """Yield the settings in which an image processor disagrees with `config`, one sentence each without full stop."""
    size, wanted = dict(image_processor.size), {"height": config.image_size, "width": config.image_size}
    if size != wanted:
        yield f"size of the image processor is {size}, and the image tokenizer reads {config.image_size} pixels a side"
    for name in ("image_mean", "image_std"):
        ours, theirs = list(getattr(image_processor, name)), list(getattr(config, name))
        if ours != theirs:
            yield f"{name} is {ours} in the image processor and {theirs} in config.json"

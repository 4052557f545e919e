"""`ImageTokenizerProcessor`: pictures to `pixel_values` and back, with PIL alone (no torchvision)."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import SiglipImageProcessorPil

from unimm.errors import UserError


class ImageTokenizerProcessor(SiglipImageProcessorPil):
    """Pictures -> normalised pixel_values [B, 3, H, W] at the tokenizer's size, and `postprocess` back to PIL.

    Both sides are resized to the tokenizer's (bicubic), as SigLIP's own processor does. With `pad_to_square` a picture
    becomes a square in the middle of the mean colour first, as LLaVA-1.5 does (`image_aspect_ratio pad`,
    https://arxiv.org/abs/2310.03744); it is saved, because reading must do as training did.
    """

    model_input_names = ["pixel_values"]
    pad_to_square = False

    @classmethod
    def for_tokenizer(cls, config: Any) -> "ImageTokenizerProcessor":
        """The processor that an `ImageTokenizerConfig` asks for."""
        size = {"height": config.image_size, "width": config.image_size}
        return cls(
            size=size,
            image_mean=list(config.image_mean),
            image_std=list(config.image_std),
            resample=3,
            do_convert_rgb=True,
        )

    def process_image(self, image: Any, **kwargs: Any) -> np.ndarray:
        """One picture as [3, H, W], before it is resized."""
        array = super().process_image(image, **kwargs)
        return _squared(array, self.image_mean) if self.pad_to_square else array

    def postprocess(self, pixels: Tensor) -> list[Image.Image]:
        """pixels [B, 3, H, W] in [0, 1] -> RGB pictures, clamped and rounded to 8 bits."""
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise UserError(f"postprocess takes pixels [B, 3, H, W], not {list(pixels.shape)}.")
        array = (pixels.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(np.ascontiguousarray(picture)) for picture in array]


def _squared(image: np.ndarray, mean: Sequence[float]) -> np.ndarray:
    """The picture [3, H, W] of 8 bits in the middle of a square of the mean colour; an odd row goes below."""
    _, height, width = image.shape
    side = max(height, width)
    square = np.empty((3, side, side), dtype=image.dtype)
    square[:] = np.array([int(255 * channel) for channel in mean])[:, None, None]  # LLaVA's rounding
    top, left = (side - height) // 2, (side - width) // 2
    square[:, top : top + height, left : left + width] = image
    return square


def image_disagreements(image_processor: Any, config: Any) -> Iterator[str]:
    """Where an image processor prepares other pixels than the tokenizer of `config` reads, one sentence each without
    its full stop."""
    size, wanted = dict(image_processor.size), {"height": config.image_size, "width": config.image_size}
    if size != wanted:
        yield f"size of the image processor is {size}, and the image tokenizer reads {config.image_size} pixels a side"
    for name in ("image_mean", "image_std"):
        ours, theirs = list(getattr(image_processor, name)), list(getattr(config, name))
        if ours != theirs:
            yield f"{name} is {ours} in the image processor and {theirs} in config.json"

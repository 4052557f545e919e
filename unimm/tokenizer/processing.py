"""`ImageTokenizerProcessor`: pictures to `pixel_values` and back, with PIL alone (no torchvision)."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import SiglipImageProcessorPil

from unimm.errors import UserError


class ImageTokenizerProcessor(SiglipImageProcessorPil):
    """Pictures -> normalised pixel_values [B, 3, H, W] at the tokenizer's size, and `postprocess` back to PIL.

    Both sides are resized to the tokenizer's (bicubic), as SigLIP's own processor does.
    """

    model_input_names = ["pixel_values"]

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

    def postprocess(self, pixels: Tensor) -> list[Image.Image]:
        """pixels [B, 3, H, W] in [0, 1] -> RGB pictures, clamped and rounded to 8 bits."""
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise UserError(f"postprocess takes pixels [B, 3, H, W], not {list(pixels.shape)}.")
        array = (pixels.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(np.ascontiguousarray(picture)) for picture in array]

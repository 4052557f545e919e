"""One image through an image tokenizer and back. M = h * w image tokens, C codebook width, K codebook size."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from unimm.evaluation.metrics.image_metrics import capped_psnr


@dataclass(frozen=True)
class Reconstruction:
    """An image as the tokenizer receives it, what its ids decode to, and how far the two are apart.

    Args:
        original, image: both of the tokenizer's size.
        ids: codebook indices, [h, w] in raster order.
        codes: codebook vectors of the ids, [h, w, C].
        codebook_size: K.
        psnr: in dB, at most 100.
    """

    original: Image.Image
    image: Image.Image
    ids: np.ndarray
    codes: np.ndarray
    codebook_size: int
    psnr: float


@torch.inference_mode()
def reconstruct_image(tokenizer: Any, image_processor: Any, image: Image.Image) -> Reconstruction:
    """Encode an image to ids and decode it again."""
    pixel_values = image_processor([image], return_tensors="pt")["pixel_values"].to(tokenizer.device, tokenizer.dtype)
    ids = tokenizer.encode(pixel_values).ids
    pixels = tokenizer.decode(ids).float().cpu()
    mean, std = (
        torch.tensor(values).view(3, 1, 1) for values in (image_processor.image_mean, image_processor.image_std)
    )
    original = pixel_values.float().cpu() * std + mean
    pair = image_processor.postprocess(torch.cat([original, pixels]))
    return Reconstruction(
        original=pair[0],
        image=pair[1],
        ids=ids[0].cpu().numpy().reshape(tokenizer.config.grid),
        codes=tokenizer.lookup(ids)[0].float().cpu().numpy().reshape(*tokenizer.config.grid, -1),
        codebook_size=int(tokenizer.config.codebook_size),
        psnr=capped_psnr(pixels, original).item(),
    )

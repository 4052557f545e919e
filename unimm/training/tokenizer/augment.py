"""Differentiable augmentation of what a discriminator sees (DiffAugment, https://arxiv.org/abs/2006.10738), so that a
small one does not learn its images by heart.

Each of three families (color, translation, cut-out) is applied to the whole batch with a given probability, its
amounts drawn for each image. Random numbers come from torch's CPU generator, in every process and micro-batch for the
images of the whole global batch, and none where nothing is applied.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from unimm.training.loop.global_batch import global_size, own_rows

TRANSLATION = 0.125  # of a side, at most


def change_colors(pixels: Tensor, amounts: Tensor) -> Tensor:
    """pixels [B, 3, H, W] in [0, 1] and amounts [B, 3] in [0, 1] for brightness (half of it is none), saturation (0
    gray, 1/2 none, 1 twice) and contrast (0 half, 1/2 none, 1 one and a half)."""
    brightness, saturation, contrast = amounts[:, :, None, None, None].unbind(1)
    pixels = pixels + (brightness - 0.5) / 2  # half a unit of [-1, 1]
    grey = pixels.mean(1, keepdim=True)
    pixels = (pixels - grey) * 2 * saturation + grey
    middle = pixels.mean((1, 2, 3), keepdim=True)
    return (pixels - middle) * (contrast + 0.5) + middle


def translate(pixels: Tensor, amounts: Tensor) -> Tensor:
    """pixels [B, 3, H, W] moved down and right by amounts [B, 2] in [-1, 1] of `TRANSLATION`, whole pixels; what comes
    in is gray."""
    height, width = pixels.shape[-2:]
    reach = (round(height * TRANSLATION), round(width * TRANSLATION))
    padded = F.pad(pixels, (reach[1], reach[1], reach[0], reach[0]), value=0.5)
    moves = [(round(y * reach[0]), round(x * reach[1])) for y, x in amounts.tolist()]
    views = [
        image[:, reach[0] - y : reach[0] - y + height, reach[1] - x : reach[1] - x + width]
        for image, (y, x) in zip(padded, moves, strict=True)
    ]
    return torch.stack(views)


def cut_out(pixels: Tensor, places: Tensor, share: float) -> Tensor:
    """pixels [B, 3, H, W] with a gray field of `share` of each side, its centre at places [B, 2] in [0, 1]; fields may
    reach over the edge."""
    mask = torch.ones(len(pixels), 1, *pixels.shape[-2:], device=pixels.device)
    for row, place in zip(mask, places.tolist(), strict=True):
        (top, down), (left, right) = (
            (max(0, round(p * side - share * side / 2)), round(p * side + share * side / 2))
            for p, side in zip(place, pixels.shape[-2:], strict=True)
        )
        row[:, top:down, left:right] = 0
    return pixels * mask + 0.5 * (1 - mask)


def augment(pixels: Tensor, *, probability: float, cutout: float) -> Tensor:
    """pixels [B, 3, H, W] in [0, 1] -> a random view of each, differentiable; `cutout` is the field's share of a
    side."""
    if not probability:
        return pixels
    colors, moves, field = (torch.rand(3) < probability).tolist()
    count = global_size(len(pixels))
    if colors:
        pixels = change_colors(pixels, own_rows(torch.rand(count, 3)).to(pixels.device))
    if moves:
        pixels = translate(pixels, 2 * own_rows(torch.rand(count, 2)) - 1)
    if field:
        pixels = cut_out(pixels, own_rows(torch.rand(count, 2)), cutout)
    return pixels

"""Differentiable augmentation of a discriminator's input (DiffAugment, https://arxiv.org/abs/2006.10738), against
overfitting of the discriminator on small data sets.

Each of three families (color, translation, cutout) is applied to the whole batch with a given probability, with
amounts sampled per image. Every process and micro-batch samples, from torch's CPU generator, the amounts of the whole
global batch and takes its own rows; nothing is sampled if the probability is 0.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from unimm.training.loop.global_batch import global_size, own_rows

TRANSLATION = 0.125  # of a side, at most


def change_colors(pixels: Tensor, amounts: Tensor) -> Tensor:
    """Change brightness, saturation and contrast of pixels [B, 3, H, W] in [0, 1].

    `amounts` [B, 3] lie in [0, 1], and 1/2 changes nothing: brightness shifts by -1/4 to 1/4, saturation is multiplied
    by 0 (gray) to 2, contrast by 1/2 to 3/2.
    """
    brightness, saturation, contrast = amounts[:, :, None, None, None].unbind(1)
    pixels = pixels + (brightness - 0.5) / 2  # half a unit of [-1, 1]
    grey = pixels.mean(1, keepdim=True)
    pixels = (pixels - grey) * 2 * saturation + grey
    middle = pixels.mean((1, 2, 3), keepdim=True)
    return (pixels - middle) * (contrast + 0.5) + middle


def translate(pixels: Tensor, amounts: Tensor) -> Tensor:
    """Shift pixels [B, 3, H, W] down and right by whole pixels, `amounts` [B, 2] in [-1, 1] times `TRANSLATION`; the
    border is filled with gray."""
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
    """Fill a rectangle of pixels [B, 3, H, W] with gray: `share` of each side, centered at `places` [B, 2] in [0, 1];
    it may cross the border."""
    mask = torch.ones(len(pixels), 1, *pixels.shape[-2:], device=pixels.device)
    for row, place in zip(mask, places.tolist(), strict=True):
        (top, down), (left, right) = (
            (max(0, round(p * side - share * side / 2)), round(p * side + share * side / 2))
            for p, side in zip(place, pixels.shape[-2:], strict=True)
        )
        row[:, top:down, left:right] = 0
    return pixels * mask + 0.5 * (1 - mask)


def augment(pixels: Tensor, *, probability: float, cutout: float) -> Tensor:
    """Return a random, differentiable view of pixels [B, 3, H, W] in [0, 1]; `cutout` is the cut-out share of a
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

"""How close images are to their originals: PSNR, SSIM, and the image that any tokenizer has to beat.

All take pixels [B, 3, H, W] in [0, 1], score each image by itself (float64 inside) and return [B]; averaging is the
caller's. Papers disagree on these numbers mostly by convention, so ours are named: PSNR has data range 1. SSIM is
Wang et al. 2004 (https://doi.org/10.1109/TIP.2003.819861) with an 11 x 11 Gaussian window of sigma 1.5, data range 1,
population covariance, the mean over channels and over the positions where the window lies wholly inside the image:
scikit-image's with `gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1`. (torchmetrics has the
same map, but also averages over positions that see a reflected border.) LlamaGen and those who took its script call
scikit-image's default, a uniform 7 x 7 window with sample covariance, at a data range of 2, which is the range of
[-1, 1], on images in [0, 1]: the constants are four times too large and the figure is higher
(`ssim_llamagen_compat`; https://github.com/FoundationVision/LlamaGen/issues/72).
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

HIGHEST_PSNR = 100.0
"""dB: what equal images count as in means and records, which cannot bear the infinite truth."""
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
SSIM_K1, SSIM_K2 = 0.01, 0.03
LLAMAGEN_WINDOW, LLAMAGEN_DATA_RANGE = 7, 2.0


def psnr(pixels: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio per image in dB, infinite for equal ones. Raises ValueError for unlike shapes."""
    _check_pair(pixels, reference)
    error = (pixels.double() - reference.double()).square().flatten(1).mean(dim=1)
    return -10 * torch.log10(error)


def capped_psnr(pixels: Tensor, reference: Tensor) -> Tensor:
    """Return `psnr`, at most HIGHEST_PSNR: always finite. Raises as `psnr` does."""
    return psnr(pixels, reference).clamp(max=HIGHEST_PSNR)


def ssim(pixels: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity per image, at most 1.

    Raises ValueError for unlike shapes or for images smaller than the window.
    """
    return _ssim(pixels, reference, _gaussian_means, window=SSIM_WINDOW, data_range=1.0)


def ssim_llamagen_compat(pixels: Tensor, reference: Tensor) -> Tensor:
    """What LlamaGen's evaluation prints as SSIM: too high, and only comparable with figures that were made so."""
    return _ssim(
        pixels,
        reference,
        lambda maps: F.avg_pool2d(maps, LLAMAGEN_WINDOW, stride=1),
        window=LLAMAGEN_WINDOW,
        data_range=LLAMAGEN_DATA_RANGE,
        covariance_factor=LLAMAGEN_WINDOW**2 / (LLAMAGEN_WINDOW**2 - 1),
    )


def _ssim(
    pixels: Tensor,
    reference: Tensor,
    local_means: Callable[[Tensor], Tensor],
    *,
    window: int,
    data_range: float,
    covariance_factor: float = 1.0,
) -> Tensor:
    _check_pair(pixels, reference)
    if min(pixels.shape[-2:]) < window:
        size = " x ".join(map(str, pixels.shape[-2:]))
        raise ValueError(f"SSIM needs images of at least {window} x {window} pixels, not {size}")
    c1, c2 = (SSIM_K1 * data_range) ** 2, (SSIM_K2 * data_range) ** 2
    x, y = pixels.double(), reference.double()
    # One filter pass over the five maps whose local means the formula needs.
    maps = torch.cat([x, y, x * x, y * y, x * y], dim=1)  # [B, 5 C, H, W]
    mean_x, mean_y, square_x, square_y, product = local_means(maps).chunk(5, dim=1)
    variances = covariance_factor * (square_x - mean_x**2 + square_y - mean_y**2)
    covariance = covariance_factor * (product - mean_x * mean_y)
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variances + c2)
    return (luminance * structure).flatten(1).mean(dim=1)


def mean_color_per_patch(pixels: Tensor, patch_size: int) -> Tensor:
    """The images with every `patch_size` square painted in its mean color: what plain colors could give.

    Raises ValueError when the sides are no multiples of `patch_size`.
    """
    height, width = pixels.shape[-2:]
    if height % patch_size or width % patch_size:
        raise ValueError(f"an image of {height} x {width} pixels is no multiple of the patch size {patch_size}")
    means = F.avg_pool2d(pixels, patch_size)
    return means.repeat_interleave(patch_size, dim=-2).repeat_interleave(patch_size, dim=-1)


def to_uint8(pixels: Tensor) -> Tensor:
    """Pixels as they would be saved: clamped to [0, 1] and rounded to 8 bits, same shape."""
    return (pixels.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)


def _gaussian_means(maps: Tensor) -> Tensor:
    """Gaussian-weighted local means [B, C, H - 10, W - 10] of maps [B, C, H, W]."""
    offsets = torch.arange(SSIM_WINDOW, dtype=maps.dtype, device=maps.device) - SSIM_WINDOW // 2
    weights = torch.exp(-0.5 * (offsets / SSIM_SIGMA) ** 2)
    weights = weights / weights.sum()
    channels = maps.shape[1]
    for shape in ((1, 1, -1, 1), (1, 1, 1, -1)):  # separable: the columns, then the rows
        maps = F.conv2d(maps, weights.view(shape).expand(channels, -1, -1, -1), groups=channels)
    return maps


def _check_pair(pixels: Tensor, reference: Tensor) -> None:
    if pixels.shape != reference.shape or pixels.ndim != 4:
        shapes = f"{list(pixels.shape)} and {list(reference.shape)}"
        raise ValueError(f"two batches [B, 3, H, W] of one shape are compared, not {shapes}")

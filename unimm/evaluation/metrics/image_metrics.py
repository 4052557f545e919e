"""Image metrics for reconstruction: PSNR, SSIM, and a baseline that paints each patch in its mean color.

The metrics take pixels [B, 3, H, W] in [0, 1], score each image by itself (in float64) and return [B]; the caller
averages. Papers differ on these metrics mostly by convention, so ours are explicit:

- PSNR has data range 1.
- SSIM is Wang et al. 2004 (https://doi.org/10.1109/TIP.2003.819861) with an 11 x 11 Gaussian window of sigma 1.5, data
  range 1 and population covariance, averaged over channels and over the positions at which the window lies inside the
  image. It equals scikit-image's with `gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1`.
  (torchmetrics computes the same map, but also averages over positions that include a reflected border.)
- `ssim_llamagen_compat` is the SSIM of LlamaGen and of work that reuses its script: scikit-image's default (a uniform
  7 x 7 window with sample covariance) on images in [0, 1], but with data range 2, the range of [-1, 1]. The constants
  are four times too large, which raises the score (https://github.com/FoundationVision/LlamaGen/issues/72).
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

HIGHEST_PSNR = 100.0
"""PSNR in dB that identical images count as in means and records, which must be finite."""
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
SSIM_K1, SSIM_K2 = 0.01, 0.03
LLAMAGEN_WINDOW, LLAMAGEN_DATA_RANGE = 7, 2.0


def psnr(pixels: Tensor, reference: Tensor) -> Tensor:
    """Compute the peak signal-to-noise ratio per image in dB, infinite for identical images.

    Raises ValueError for different shapes.
    """
    _check_pair(pixels, reference)
    error = (pixels.double() - reference.double()).square().flatten(1).mean(dim=1)
    return -10 * torch.log10(error)


def capped_psnr(pixels: Tensor, reference: Tensor) -> Tensor:
    """Compute `psnr`, capped at HIGHEST_PSNR and so always finite. Raises as `psnr` does."""
    return psnr(pixels, reference).clamp(max=HIGHEST_PSNR)


def ssim(pixels: Tensor, reference: Tensor) -> Tensor:
    """Compute the structural similarity per image, at most 1.

    Raises ValueError for different shapes or for images smaller than the window.
    """
    return _ssim(pixels, reference, _gaussian_means, window=SSIM_WINDOW, data_range=1.0)


def ssim_llamagen_compat(pixels: Tensor, reference: Tensor) -> Tensor:
    """Compute SSIM as LlamaGen's evaluation does: too high, and comparable only with scores computed this way."""
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
    """Paint every `patch_size` square of the images in its mean color: a baseline for reconstructions.

    Raises ValueError if the sides are not multiples of `patch_size`.
    """
    height, width = pixels.shape[-2:]
    if height % patch_size or width % patch_size:
        raise ValueError(f"an image of {height} x {width} pixels is no multiple of the patch size {patch_size}")
    means = F.avg_pool2d(pixels, patch_size)
    return means.repeat_interleave(patch_size, dim=-2).repeat_interleave(patch_size, dim=-1)


def to_uint8(pixels: Tensor) -> Tensor:
    """Convert pixels to 8 bits as an image file would store them: clamped to [0, 1] and rounded, same shape."""
    return (pixels.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)


def _gaussian_means(maps: Tensor) -> Tensor:
    """Compute Gaussian-weighted local means [B, C, H - 10, W - 10] of maps [B, C, H, W]."""
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

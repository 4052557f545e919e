"""How close pictures are to their originals: PSNR, SSIM, and the picture that any tokenizer has to beat.

All take pixels [B, 3, H, W] in [0, 1], score each picture by itself (float64 inside) and return [B]; averaging is the
caller's. Papers disagree on these numbers mostly by convention, so ours are named: PSNR has data range 1. SSIM is
Wang et al. 2004 (https://doi.org/10.1109/TIP.2003.819861) with an 11 x 11 Gaussian window of sigma 1.5, data range 1,
population covariance, the mean over channels and over the positions where the window lies wholly inside the picture:
scikit-image's with `gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1`. (torchmetrics has the
same map, but also averages over positions that see a reflected border.)
"""

import torch
from torch import Tensor
from torch.nn import functional as F

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2  # (K1 L)² and (K2 L)² for data range L = 1


def psnr(pixels: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio per picture in dB, infinite for equal ones. Raises ValueError for unlike shapes."""
    _check_pair(pixels, reference)
    error = (pixels.double() - reference.double()).square().flatten(1).mean(dim=1)
    return -10 * torch.log10(error)


def ssim(pixels: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity per picture, at most 1.

    Raises ValueError for unlike shapes or for pictures smaller than the window.
    """
    _check_pair(pixels, reference)
    if min(pixels.shape[-2:]) < SSIM_WINDOW:
        size = " x ".join(map(str, pixels.shape[-2:]))
        raise ValueError(f"SSIM needs pictures of at least {SSIM_WINDOW} x {SSIM_WINDOW} pixels, not {size}")
    x, y = pixels.double(), reference.double()
    # One filter pass over the five maps whose local means the formula needs.
    maps = torch.cat([x, y, x * x, y * y, x * y], dim=1)  # [B, 5 C, H, W]
    mean_x, mean_y, square_x, square_y, product = _gaussian_means(maps).chunk(5, dim=1)
    variance_x, variance_y, covariance = square_x - mean_x**2, square_y - mean_y**2, product - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + SSIM_C1) / (mean_x**2 + mean_y**2 + SSIM_C1)
    structure = (2 * covariance + SSIM_C2) / (variance_x + variance_y + SSIM_C2)
    return (luminance * structure).flatten(1).mean(dim=1)


def mean_color_per_patch(pixels: Tensor, patch_size: int) -> Tensor:
    """The pictures with every `patch_size` square painted in its mean colour: what plain colours could give.

    Raises ValueError when the sides are no multiples of `patch_size`.
    """
    height, width = pixels.shape[-2:]
    if height % patch_size or width % patch_size:
        raise ValueError(f"a picture of {height} x {width} pixels is no multiple of the patch size {patch_size}")
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

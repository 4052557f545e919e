"""PSNR and SSIM against torchmetrics and scikit-image."""

import math

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from unimm.evaluation.metrics.image_metrics import mean_color_per_patch, psnr, ssim, ssim_llamagen_compat, to_uint8


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    reference = torch.nn.functional.interpolate(torch.rand(3, 3, 6, 5), size=(48, 40), mode="bicubic").clamp(0, 1)
    return (reference + 0.1 * torch.randn(reference.shape)).clamp(0, 1), reference


def test_psnr_is_per_image_with_data_range_one(pair: tuple[Tensor, Tensor]) -> None:
    expected = [peak_signal_noise_ratio(x[None], y[None], data_range=1.0) for x, y in zip(*pair, strict=True)]
    torch.testing.assert_close(psnr(*pair), torch.stack(expected).double(), atol=1e-4, rtol=0)


def test_psnr_of_known_errors() -> None:
    reference = torch.zeros(2, 3, 4, 4)
    off_by = torch.stack([torch.full((3, 4, 4), 0.1), torch.full((3, 4, 4), 0.01)])
    torch.testing.assert_close(psnr(off_by, reference), torch.tensor([20.0, 40.0], dtype=torch.float64))
    assert math.isinf(psnr(reference, reference)[0])


def test_ssim_is_that_of_torchmetrics_inside_the_image(pair: tuple[Tensor, Tensor]) -> None:
    """Its mean also takes positions where the window lies over a reflected border; without them the maps agree."""
    x, y = (each.double() for each in pair)
    options = {"data_range": 1.0, "reduction": "none", "return_full_image": True}
    _, map_ = structural_similarity_index_measure(x, y, **options)
    expected = map_[..., 5:-5, 5:-5].flatten(1).mean(dim=1)
    torch.testing.assert_close(ssim(*pair), expected, atol=1e-9, rtol=0)


def test_ssim_is_that_of_scikit_image(pair: tuple[Tensor, Tensor]) -> None:
    convention = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    arrays = [x.double().permute(0, 2, 3, 1).numpy() for x in pair]
    expected = [structural_similarity(x, y, channel_axis=-1, **convention) for x, y in zip(*arrays, strict=True)]
    np.testing.assert_allclose(ssim(*pair).numpy(), expected, atol=1e-9)


def test_ssim_of_llamagen_is_that_of_scikit_image_at_a_data_range_of_two(pair: tuple[Tensor, Tensor]) -> None:
    arrays = [x.double().permute(0, 2, 3, 1).numpy() for x in pair]
    expected = [structural_similarity(x, y, channel_axis=-1, data_range=2.0) for x, y in zip(*arrays, strict=True)]
    found = ssim_llamagen_compat(*pair)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-9)
    assert (found > ssim(*pair)).all()


def test_ssim_of_equal_images_is_one(pair: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(ssim(pair[1], pair[1]), torch.ones(3, dtype=torch.float64))


def test_unlike_or_tiny_images_are_refused() -> None:
    small = torch.zeros(1, 3, 10, 32)
    with pytest.raises(ValueError, match=r"at least 11 x 11 pixels, not 10 x 32"):
        ssim(small, small)
    for metric in (psnr, ssim):
        with pytest.raises(ValueError, match=r"\[1, 3, 16, 16\] and \[2, 3, 16, 16\]"):
            metric(torch.zeros(1, 3, 16, 16), torch.zeros(2, 3, 16, 16))


def test_mean_color_per_patch() -> None:
    pixels = torch.rand(2, 3, 8, 12)
    painted = mean_color_per_patch(pixels, 4)
    torch.testing.assert_close(painted[1, 2, 4:, 8:], pixels[1, 2, 4:, 8:].mean().expand(4, 4))
    torch.testing.assert_close(mean_color_per_patch(painted, 4), painted)
    with pytest.raises(ValueError, match="8 x 12 pixels is no multiple of the patch size 5"):
        mean_color_per_patch(pixels, 5)


def test_to_uint8_clamps_and_rounds() -> None:
    values = torch.tensor([-1.0, 0.0, 0.49 / 255, 0.51 / 255, 254.6 / 255, 1.0, 2.0])
    assert to_uint8(values).tolist() == [0, 0, 0, 1, 255, 255, 255]

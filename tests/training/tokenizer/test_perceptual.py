"""The perceptual networks against independent implementations with random weights, and the arithmetic of their sums."""

import copy
from pathlib import Path
from typing import TypeVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ConvNextConfig, ConvNextForImageClassification, SiglipVisionConfig, SiglipVisionModel

from unimm.errors import UserError
from unimm.networks import perceptual as perceptual_networks
from unimm.networks.perceptual import LPIPS, ConvNeXt, load_convnext, load_lpips
from unimm.training.tokenizer.perceptual import (
    FeaturePerceptualLoss,
    PerceptualLoss,
    build_perceptual,
    parse_perceptual,
)

Judge = TypeVar("Judge", LPIPS, ConvNeXt)

TINY_VGG = ((4, 4), (6, 6), (8, 8, 8), (10, 10, 10), (10, 10, 10))


def tiny_convnext() -> ConvNeXt:
    return ConvNeXt(depths=(1, 2, 1, 1), widths=(8, 12, 16, 20), num_classes=7)


def images(side: int = 32, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, 3, side, side, generator=generator), torch.rand(2, 3, side, side, generator=generator)


def randomised(module: Judge, seed: int = 0) -> Judge:
    torch.manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.1))
    return module


def plain_lpips(state: dict[str, Tensor], first: Tensor, second: Tensor) -> Tensor:
    """LPIPS as its paper has it, in float64 and by loops, with the standard VGG-16 layer numbers."""
    shift = torch.tensor([-0.030, -0.088, -0.188], dtype=torch.float64)[:, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450], dtype=torch.float64)[:, None, None]
    layers = [[0, 2], [5, 7], [10, 12, 14], [17, 19, 21], [24, 26, 28]]
    state = {key: value.double() for key, value in state.items()}
    a, b = ((2 * x.double() - 1 - shift) / scale for x in (first, second))
    total = torch.zeros((), dtype=torch.float64)
    for stage, indices in enumerate(layers):
        if stage:
            a, b = F.max_pool2d(a, 2), F.max_pool2d(b, 2)
        for index in indices:
            weight, bias = state[f"features.{index}.weight"], state[f"features.{index}.bias"]
            a, b = (F.relu(F.conv2d(x, weight, bias, padding=1)) for x in (a, b))
        unit = [x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10) for x in (a, b)]
        squares = (unit[0] - unit[1]).square()
        total = total + torch.einsum("bchw,c->bhw", squares, state[f"lin{stage}.model.1.weight"].flatten()).mean()
    return total


def test_lpips_equals_a_plain_reimplementation() -> None:
    network = randomised(LPIPS(TINY_VGG))
    first, second = images()
    expected = plain_lpips(network.state_dict(), first, second).item()
    assert network(first, second).item() == pytest.approx(expected, rel=1e-5)
    assert network(first, first).item() == 0.0
    each = [network(a[None], b[None]).item() for a, b in zip(first, second, strict=True)]
    assert network.distances(first, second).tolist() == pytest.approx(each, rel=1e-5)


def test_lpips_has_no_nan_gradient_where_all_features_are_dead() -> None:
    network = LPIPS(TINY_VGG)
    for parameter in network.parameters():
        parameter.data.zero_()
    first, second = images()
    first.requires_grad_()
    network(first, second).backward()
    assert first.grad.isfinite().all()


def test_published_sizes() -> None:
    with torch.device("meta"):
        lpips, convnext = LPIPS(), ConvNeXt()
    trunk = sum(value.numel() for key, value in lpips.state_dict().items() if key.startswith("features."))
    assert trunk == 14_714_688  # torchvision's vgg16().features
    assert sum(value.numel() for value in lpips.state_dict().values()) - trunk == 64 + 128 + 256 + 512 + 512
    assert sum(value.numel() for value in convnext.state_dict().values()) == 50_223_688  # torchvision's convnext_small
    assert {"features.28.bias", "lin4.model.1.weight"} <= lpips.state_dict().keys()
    names = {"features.0.1.weight", "features.1.0.layer_scale", "features.1.0.block.5.bias", "features.6.1.weight"}
    assert names | {"classifier.2.bias"} <= convnext.state_dict().keys()


def test_convnext_equals_transformers() -> None:
    ours = randomised(tiny_convnext())
    config = ConvNextConfig(depths=[1, 2, 1, 1], hidden_sizes=[8, 12, 16, 20], num_labels=7, layer_norm_eps=1e-6)
    theirs = ConvNextForImageClassification(config).eval()
    with torch.no_grad():  # both register their tensors in the order of computation, a block's layer scale first
        for target, source in zip(theirs.state_dict().values(), ours.state_dict().values(), strict=True):
            target.copy_(source.reshape(target.shape))
    pixels, _ = images(224)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        expected = theirs((pixels - mean[:, None, None]) / std[:, None, None]).logits
        assert torch.allclose(ours.logits(pixels), expected, atol=1e-4, rtol=1e-4)


def test_convnext_resizes_both_images() -> None:
    network = randomised(tiny_convnext())
    first, second = images(40)
    with torch.no_grad():
        expected = (network.logits(first) - network.logits(second)).square().mean()
        assert network(first, second).item() == pytest.approx(expected.item())


@pytest.fixture
def judges() -> tuple[nn.Module, nn.Module]:
    return randomised(LPIPS(TINY_VGG)), randomised(tiny_convnext())


def test_weighted_average_times_1_1_is_the_sum(judges: tuple[nn.Module, nn.Module]) -> None:
    first, second = images()
    lpips, convnext = judges
    pairs = {"lpips": (1.0, lpips), "convnext_s": (0.1, convnext)}
    expected = (lpips(first, second) + 0.1 * convnext(first, second)).item()
    assert PerceptualLoss(pairs)(first, second).item() == pytest.approx(expected, rel=1e-6)
    assert 1.1 * PerceptualLoss(pairs, average=True)(first, second).item() == pytest.approx(expected, rel=1e-6)
    terms = PerceptualLoss(pairs).terms(first, second)
    assert terms == {"lpips": lpips(first, second), "convnext_s": convnext(first, second)}
    assert PerceptualLoss(pairs).total(terms).item() == pytest.approx(expected, rel=1e-6)


def test_only_the_prediction_gets_gradients_and_the_judges_stay_frozen(judges: tuple[nn.Module, nn.Module]) -> None:
    loss = PerceptualLoss({"lpips": (1.0, judges[0]), "convnext_s": (0.1, judges[1])}).train()
    predicted, target = (image.requires_grad_() for image in images())
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(predicted, target)
    value.backward()
    assert value.dtype == torch.float32 and predicted.grad.abs().sum() > 0 and target.grad is None
    assert not any(parameter.requires_grad for parameter in loss.parameters())
    assert not any(module.training for module in loss.modules())


def test_none_is_zero() -> None:
    first, second = images()
    assert build_perceptual("none")(first, second).item() == 0.0


def test_parse() -> None:
    assert parse_perceptual("lpips+0.1*convnext_s") == {"lpips": 1.0, "convnext_s": 0.1}
    assert parse_perceptual(" 2 * features ") == {"features": 2.0}
    assert parse_perceptual("none") == {}
    for wrong in ("lpip", "", "lpips+", "lpips+lpips", "lpips*0.1", "-1*lpips", "none+lpips"):
        with pytest.raises(UserError, match="lpips, convnext_s, features"):
            parse_perceptual(wrong)


def test_absent_files_are_named_with_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perceptual_networks, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="vgg16-397923af.*set vgg16"):
        build_perceptual("lpips")
    with pytest.raises(UserError, match="absent.pth holds none.*convnext_small-0c510722.*set convnext_s"):
        build_perceptual("convnext_s", convnext_s=str(tmp_path / "absent.pth"))
    with pytest.raises(UserError, match="encoder whose features"):
        build_perceptual("0.5*features")
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "part.pth")
    with pytest.raises(UserError, match="set lpips_heads"):
        build_perceptual("lpips", vgg16=str(tmp_path / "part.pth"))
    with pytest.raises(UserError, match="tensors are missing"):
        build_perceptual("lpips", vgg16=str(tmp_path / "part.pth"), lpips_heads=str(tmp_path / "part.pth"))
    with pytest.raises(UserError, match="do not fit"):
        build_perceptual("convnext_s", convnext_s=str(tmp_path / "part.pth"))


def test_files_load_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perceptual_networks, "LPIPS", lambda: LPIPS(TINY_VGG))
    monkeypatch.setattr(perceptual_networks, "ConvNeXt", tiny_convnext)
    lpips, convnext = randomised(LPIPS(TINY_VGG)), randomised(tiny_convnext())
    state = lpips.state_dict()
    trunk = {key: value for key, value in state.items() if key.startswith("features.")}
    torch.save(trunk | {"classifier.0.weight": torch.zeros(3, 3)}, tmp_path / "vgg16.pth")
    torch.save({key: value for key, value in state.items() if key.startswith("lin")}, tmp_path / "vgg.pth")
    torch.save(convnext.state_dict(), tmp_path / "convnext.pth")
    loaded = load_lpips(tmp_path / "vgg16.pth", tmp_path / "vgg.pth")
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    first, second = images()
    assert torch.equal(load_convnext(tmp_path / "convnext.pth")(first, second), convnext(first, second))


# features


def test_feature_loss_is_two_minus_two_cosines() -> None:
    def states(pixels: Tensor) -> list[Tensor]:
        tokens = pixels.flatten(2).transpose(1, 2)
        return [torch.zeros(1), tokens, tokens @ torch.diag(torch.tensor([1.0, 5.0, -2.0]))]

    first, second = images(4)
    value = FeaturePerceptualLoss(states, layers=(1, -1))(first, second)
    pairs = zip(states(first)[1:], states(second)[1:], strict=True)
    cosines = [F.cosine_similarity(u, v, dim=-1).mean().item() for u, v in pairs]
    assert value.item() == pytest.approx(2 - sum(cosines), abs=1e-5)
    with pytest.raises(ValueError, match=r"\(3,\).*3 hidden states"):
        FeaturePerceptualLoss(states, layers=(3,))(first, second)
    with pytest.raises(ValueError, match="at least one layer"):
        FeaturePerceptualLoss(states, layers=())


def test_features_of_a_siglip_judge_a_frozen_copy() -> None:
    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    encoder = SiglipVisionModel(config)
    judge = copy.deepcopy(encoder).requires_grad_(False).eval()
    features = FeaturePerceptualLoss(
        lambda pixels: judge(2 * pixels - 1, output_hidden_states=True).hidden_states, layers=(1, 2)
    )
    loss = build_perceptual("features", features=features)
    first, second = images()
    first.requires_grad_()
    before = loss(first, second)
    before.backward()
    assert before.item() > 0 and first.grad.abs().sum() > 0
    assert loss(first, first).item() == pytest.approx(0.0, abs=1e-6)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in encoder.parameters())
    assert not list(loss.parameters()) and not loss.state_dict()
    for parameter in encoder.parameters():
        parameter.data.zero_()
    assert torch.equal(loss(first, second), before)


def test_bad_images_are_refused(judges: tuple[nn.Module, nn.Module]) -> None:
    loss = PerceptualLoss({"lpips": (1.0, judges[0])})
    with pytest.raises(ValueError, match=r"\(2, 3, 32, 32\).*\(2, 3, 16, 16\)"):
        loss(torch.rand(2, 3, 32, 32), torch.rand(2, 3, 16, 16))
    with pytest.raises(ValueError, match="at least 16 px"):
        loss(torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8))

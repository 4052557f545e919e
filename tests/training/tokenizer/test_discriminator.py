"""Discriminators against published sizes, transformers' ViT and plain formulas; losses against closed forms."""

import hashlib
import logging
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

from unimm.errors import UserError
from unimm.networks.dino import DinoTrunk, load_dino_trunk
from unimm.training.tokenizer.discriminator import (
    BlurPool,
    DinoDiscriminator,
    DinoHead,
    LeCam,
    LocalBatchNorm,
    PatchGAN,
    build_discriminator,
    frozen,
    hinge_d_loss,
    hinge_g_loss,
)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def random_trunk(seed: int = 0) -> DinoTrunk:
    torch.manual_seed(seed)
    trunk = DinoTrunk()
    for parameter in trunk.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return trunk


@pytest.fixture(scope="module")
def trunk() -> DinoTrunk:
    return random_trunk()


# PatchGAN


def test_patchgan_has_the_published_size() -> None:
    assert count(PatchGAN()) == 1_909_889


@pytest.mark.parametrize(("side", "logits"), [(16, 1), (32, 2), (64, 4), (100, 6), (256, 16), (288, 16)])
def test_patchgan_gives_one_logit_per_16_pixels_up_to_16(side: int, logits: int) -> None:
    assert PatchGAN(width=32)(torch.rand(2, 3, side, side)).shape == (2, 1, logits, logits)


def test_patchgan_takes_images_that_are_not_square() -> None:
    assert PatchGAN(width=32)(torch.rand(1, 3, 64, 32)).shape == (1, 1, 4, 2)


def test_blur_pool_is_the_binomial_kernel() -> None:
    impulse = torch.zeros(1, 1, 8, 8)
    impulse[0, 0, 3, 3] = 1
    line = torch.tensor([3 / 8, 1 / 8])  # taps of outputs 1 and 2, whose windows start at pixels 1 and 3
    assert torch.equal(BlurPool()(impulse)[0, 0, 1:3, 1:3], torch.outer(line, line))
    assert BlurPool()(torch.ones(1, 2, 9, 8)).shape == (1, 2, 5, 4)
    assert torch.allclose(BlurPool()(torch.ones(1, 2, 12, 12))[..., 1:-1, 1:-1], torch.ones(()))


# DINO


def test_dino_heads_have_the_published_size(trunk: DinoTrunk) -> None:
    discriminator = DinoDiscriminator(trunk)
    assert count(discriminator) == 7_386_245
    assert discriminator(torch.rand(1, 3, 224, 224)).shape == (1, 980)


@pytest.mark.parametrize("size", [(64, 64), (256, 240), (256, 200)])
def test_dino_resizes_any_image(trunk: DinoTrunk, size: tuple[int, int]) -> None:
    assert DinoDiscriminator(trunk)(torch.rand(1, 3, *size)).shape == (1, 980)


def test_dino_crops_in_training_only(trunk: DinoTrunk) -> None:
    discriminator = DinoDiscriminator(trunk)
    pixels = torch.rand(1, 3, 240, 256)
    whole = F.interpolate(pixels, size=(224, 224), mode="area")
    torch.manual_seed(0)
    crops = [not torch.equal(discriminator._to_trunk_size(pixels), whole) for _ in range(200)]
    assert 70 < sum(crops) < 130
    discriminator.eval()
    assert all(torch.equal(discriminator._to_trunk_size(pixels), whole) for _ in range(20))


def test_dino_trunk_is_neither_saved_nor_optimised_nor_halved(trunk: DinoTrunk) -> None:
    discriminator = DinoDiscriminator(trunk).to(torch.bfloat16)
    assert all(name.startswith("heads.") for name in discriminator.state_dict())
    assert all(name.startswith("heads.") for name, _ in discriminator.named_parameters())
    assert {tensor.dtype for tensor in discriminator.trunk.state_dict().values()} == {torch.float32}
    assert DinoDiscriminator(DinoTrunk()).to("meta").trunk.cls_token.is_meta


def test_dino_trunk_equals_transformers_vit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=384,
        intermediate_size=1536,
        num_attention_heads=6,
        hidden_act="gelu_pytorch_tanh",
        layer_norm_eps=1e-6,
    )
    vit = ViTModel(config, add_pooling_layer=False).eval()
    for parameter in vit.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    vit.save_pretrained(tmp_path)
    # as written by ViTForImageClassification: a prefix, and tensors that the trunk has no use for
    tensors = load_file(tmp_path / "model.safetensors")
    prefixed = {f"vit.{key}": value for key, value in tensors.items()} | {"classifier.weight": torch.zeros(2, 384)}
    save_file(prefixed, tmp_path / "prefixed.safetensors")

    pixels = torch.rand(1, 3, 224, 224)
    trunk = load_dino_trunk(tmp_path)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        states = vit((pixels - mean[:, None, None]) / std[:, None, None], output_hidden_states=True).hidden_states
        readouts = trunk(pixels)
        again = load_dino_trunk(tmp_path / "prefixed.safetensors")(pixels)
    for readout, index in zip(readouts, (0, 3, 6, 9, 12), strict=True):
        expected = (states[index][:, 1:] + states[index][:, :1]).transpose(1, 2)
        assert torch.allclose(readout, expected, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(readouts, again, strict=True))
    assert all(block.attn.qkv.bias[384:768].eq(0).all() for block in trunk.blocks)


def test_dino_head_equals_plain_formulas() -> None:
    torch.manual_seed(0)
    head = DinoHead().eval()
    readout = torch.randn(4, 384, 196)

    def conv(layer: nn.Module, x: Tensor) -> Tensor:
        weight = layer.parametrizations.weight.original
        flat = weight.flatten(1)
        norm = layer.parametrizations.weight[0]
        sigma = torch.dot(norm._u, flat @ norm._v)
        side = weight.shape[-1] // 2
        return F.conv1d(F.pad(x, (side, side), mode="circular"), weight / sigma, layer.bias)

    def block(layers: nn.Module, x: Tensor) -> Tensor:
        x = F.batch_norm(conv(layers[0], x), None, None, training=True, eps=1e-6)
        return F.leaky_relu(x, 0.2)

    with torch.no_grad():
        x = block(head.inlet, readout)
        x = (block(head.mixer, x) + x) / math.sqrt(2)
        expected = conv(head.to_logits, x)[:, 0]
        assert torch.allclose(head(readout), expected, atol=1e-4)


def test_spectral_norm_comes_close_to_one() -> None:
    torch.manual_seed(0)
    layer = DinoHead().inlet[0]
    for _ in range(50):
        layer(torch.zeros(1, 384, 4))
    assert torch.linalg.matrix_norm(layer.weight[..., 0], ord=2).item() == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize(("batch", "group"), [(3, 3), (8, 8), (9, 3), (11, 1), (12, 6), (16, 8)])
def test_local_batch_norm_takes_any_batch(batch: int, group: int) -> None:
    x = torch.randn(batch, 4, 5) * 3 + 1
    expected = torch.cat([F.batch_norm(part, None, None, training=True, eps=1e-6) for part in x.split(group)])
    assert torch.allclose(LocalBatchNorm(4)(x), expected, atol=1e-5)


def test_gradients_flow_only_where_they_should(trunk: DinoTrunk) -> None:
    for discriminator in (PatchGAN(width=32), DinoDiscriminator(trunk)):
        pixels = torch.rand(1, 3, 224, 224, requires_grad=True)
        with frozen(discriminator):
            hinge_g_loss(discriminator(pixels)).backward()
        assert pixels.grad is not None and pixels.grad.abs().sum() > 0
        assert all(parameter.grad is None for parameter in discriminator.parameters())
        assert all(parameter.requires_grad for parameter in discriminator.parameters())
        hinge_d_loss(discriminator(torch.rand(1, 3, 224, 224)), discriminator(pixels.detach())).backward()
        assert all(parameter.grad is not None for parameter in discriminator.parameters())
    assert all(parameter.grad is None for parameter in trunk.parameters())


# building


def test_build_reads_the_published_layout_and_logs_its_hash(
    trunk: DinoTrunk, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "dino.pth"
    torch.save(trunk.state_dict() | {"norm.weight": torch.ones(384), "norm.bias": torch.zeros(384)}, file)
    with caplog.at_level(logging.INFO):
        discriminator = build_discriminator("dino", str(file), 256)
    assert isinstance(discriminator, DinoDiscriminator)
    assert hashlib.sha256(file.read_bytes()).hexdigest() in caplog.text
    assert torch.equal(discriminator.trunk.pos_embed, trunk.pos_embed)


def test_build_refuses_with_advice(tmp_path: Path) -> None:
    garbage, other = tmp_path / "garbage.pth", tmp_path / "other.pth"
    garbage.write_bytes(b"no weights at all")
    torch.save({"fc.weight": torch.zeros(2, 2)}, other)
    for weights in (None, str(tmp_path / "absent.pth"), str(tmp_path), str(garbage), str(other)):
        with pytest.raises(UserError, match=r"dino_deitsmall16_pretrain\.pth.*dino-vits16"):
            build_discriminator("dino", weights, 256)
    with pytest.raises(UserError, match="takes no weights"):
        build_discriminator("patchgan", "file.pth", 256)
    with pytest.raises(UserError, match="at least 16 px and got 8 px"):
        build_discriminator("patchgan", None, 8)
    with pytest.raises(UserError, match='"stylegan"'):
        build_discriminator("stylegan", None, 64)  # type: ignore[arg-type]


def test_code_in_a_weight_file_is_not_run(tmp_path: Path) -> None:
    torch.save({"module": nn.Linear(2, 2)}, tmp_path / "pickled.pth")
    with pytest.raises(UserError, match="cannot be read"):
        build_discriminator("dino", str(tmp_path / "pickled.pth"), 256)


# losses


def test_hinge_closed_forms() -> None:
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([[-2.0], [0.0]])
    assert hinge_d_loss(real, fake).item() == pytest.approx(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1) / 2))
    assert hinge_g_loss(fake).item() == pytest.approx(1.0)


def regularized(lecam: LeCam, real: Tensor, fake: Tensor) -> float:
    """The regularizer of one batch, after which the running means move."""
    means = lecam.means(real, fake)
    loss = lecam(real, fake, means).item()
    lecam.update(means)
    return loss


def test_lecam_by_hand() -> None:
    lecam = LeCam(decay=0.9)
    # The first batch is compared with zeros: relu(2 - 0)^2 + relu(0 - (-1))^2.
    assert regularized(lecam, torch.tensor([1.0, 3.0]), torch.tensor([-1.0])) == pytest.approx(5.0)
    assert lecam.real_ema.item() == pytest.approx(0.2) and lecam.fake_ema.item() == pytest.approx(-0.1)
    # relu(0.4 + 0.1)^2 + relu(0.2 - 0.5)^2
    assert regularized(lecam, torch.tensor([0.4]), torch.tensor([0.5])) == pytest.approx(0.25)
    assert lecam.real_ema.item() == pytest.approx(0.22) and lecam.fake_ema.item() == pytest.approx(-0.04)
    restored = LeCam(decay=0.9)
    restored.load_state_dict(lecam.state_dict())
    assert torch.equal(restored.real_ema, lecam.real_ema) and torch.equal(restored.fake_ema, lecam.fake_ema)


def test_lecam_of_every_logit_by_hand() -> None:
    """IDEAL's: the running means move first, to 0.2 and -0.1; then every logit counts."""
    lecam = LeCam(decay=0.9, elementwise=True)
    real, fake = torch.tensor([1.0, 3.0]), torch.tensor([-1.0])
    means = lecam.means(real, fake)
    lecam.update(means)
    assert lecam(real, fake, means).item() == pytest.approx((1.1**2 + 3.1**2) / 2 + 1.2**2)


def test_lecam_is_differentiable_reduces_and_rests_in_eval() -> None:
    seen: list[Tensor] = []

    def mean(means: Tensor) -> Tensor:
        seen.append(means)
        return means + 1.0

    lecam = LeCam(decay=0.0, mean=mean)
    real = torch.tensor([1.0, 3.0], requires_grad=True)
    fake = torch.tensor([-1.0], requires_grad=True)
    means = lecam.means(real, fake)
    lecam(real, fake, means).backward()
    # relu(3 - 0)^2 + relu(0 - 0)^2: the square is of the mean over all, its slope 6 over two logits
    assert torch.equal(real.grad, torch.tensor([3.0, 3.0])) and torch.equal(fake.grad, torch.tensor([0.0]))
    assert seen[0].tolist() == [2.0, -1.0]
    lecam.update(means)
    assert (lecam.real_ema.item(), lecam.fake_ema.item()) == (3.0, 0.0)
    lecam.eval()
    lecam.update(means + 1)
    assert lecam.real_ema.item() == 3.0

"""Training VFMTok and IDEAL: the terms in closed form, who gets which gradient, and what stays as it was."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.tokenizer.conftest import tiny
from tests.training.tokenizer.test_trainer import NO_JUDGE, Small, alone_and_on_one_thread, touched
from unimm.errors import UserError
from unimm.tokenizer import TOKENIZERS, ImageTokenizer
from unimm.training.loop.arguments import TokenizerTrainingConfig
from unimm.training.tokenizer.discriminator import softplus_g_loss
from unimm.training.tokenizer.objective import GANConfig, ObjectiveConfig, TokenizerObjective, cosine_loss
from unimm.training.tokenizer.parameters import parameter_groups, set_trainable
from unimm.training.tokenizer.reconstruct import Reconstruct
from unimm.training.tokenizer.trainer import TokenizerTrainer

KINDS = ("vfmtok", "ideal")
__all__ = ["alone_and_on_one_thread"]  # an automatic fixture, here too


@pytest.fixture
def pixel_values() -> torch.Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_cosine_loss_in_closed_form():
    x = torch.randn(2, 5, 7)
    for scale, expected in ((3.0, 0.0), (-0.5, 2.0)):
        assert float(cosine_loss(x, scale * x)) == pytest.approx(expected, abs=1e-6)
    assert float(cosine_loss(torch.eye(4)[None, :2], torch.eye(4)[None, 2:])) == pytest.approx(1.0)
    y = torch.randn(2, 5, 7)
    dots = (x.double() * y.double()).sum(-1) / (x.double().norm(dim=-1) * y.double().norm(dim=-1))
    assert float(cosine_loss(x, y)) == pytest.approx(float((1 - dots).mean()), rel=1e-5)


def test_the_softplus_generator_loss_in_closed_form():
    assert float(softplus_g_loss(torch.zeros(3))) == pytest.approx(0.693147, abs=1e-6)
    assert float(softplus_g_loss(torch.tensor([40.0]))) == pytest.approx(0.0, abs=1e-6)
    assert float(softplus_g_loss(torch.tensor([-40.0]))) == pytest.approx(40.0)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_map(kind: str, pixel_values: torch.Tensor) -> None:
    model = tiny(kind).train()
    set_trainable(model, 1)
    drawn = {"sampler", "decoder"}
    expected = {
        "pixel": drawn | {"pixel_head"},
        "codebook": {"quantizer"},
        "commitment": {"sampler"},
        "entropy": {"sampler", "quantizer"},
        "deep_cosine": drawn,
        "deep_mse": drawn,
    }
    if kind == "ideal":
        expected |= {"shallow_cosine": drawn, "shallow_mse": drawn}
    objective, reconstruct = TokenizerObjective(ObjectiveConfig(perceptual=NO_JUDGE)), Reconstruct(model, 0.1)
    for name, parts in expected.items():
        model.zero_grad()
        output, _ = reconstruct(pixel_values)
        terms = objective.terms(output, model.denormalize(pixel_values), None)
        assert terms.keys() == expected.keys()
        terms[name].backward()
        assert touched(model) == parts, name


def test_pixels_teach_ideals_deep_features_and_not_its_shallow_ones(pixel_values: torch.Tensor) -> None:
    model = tiny("ideal")
    model.reconstruct(pixel_values).pixels.square().mean().backward()
    assert model.decoder.deep_head.weight.grad.any() and model.decoder.shallow_head.weight.grad is None


@pytest.mark.parametrize("kind", KINDS)
def test_the_sum_of_the_terms_has_the_given_weights(kind: str, pixel_values: torch.Tensor) -> None:
    model = tiny(kind)
    weights: dict[str, Any] = {"deep_mse_weight": 2.0, "shallow_mse_weight": 3.0, "entropy_weight": 0.5}
    objective = TokenizerObjective(ObjectiveConfig(perceptual=NO_JUDGE, **weights))
    output, _ = Reconstruct(model, 0.1)(pixel_values)
    pixels = model.denormalize(pixel_values)
    deep, target = output.predictions["deep"], output.targets["deep"]
    unit = F.normalize(output.latents, dim=-1)
    expected = (
        (output.pixels - pixels).square().mean()
        + 1.25 * (model.lookup(output.ids) - unit).square().mean()
        + 0.5 * output.entropy_loss
        + (1 - (F.normalize(deep, dim=-1) * F.normalize(target, dim=-1)).sum(-1)).mean()
        + 2 * (deep - target).square().mean()
    )
    if kind == "ideal":
        shallow, target = output.predictions["shallow"], output.targets["shallow"]
        expected = expected + (1 - (F.normalize(shallow, dim=-1) * F.normalize(target, dim=-1)).sum(-1)).mean()
        expected = expected + 3 * (shallow - target).square().mean()
    found = objective.total(objective.terms(output, pixels, None))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def trainer(kind: str, output_dir: Any, stage: int = 1, loss: dict[str, Any] | None = None) -> TokenizerTrainer:
    """Three steps with a GAN from the second on."""
    steps = {"steps": 3, "warmup_steps": 1, "save_steps": 3, "log_steps": 3, "panel_steps": 3, "restart_steps": 2}
    config = TokenizerTrainingConfig(
        output_dir=str(output_dir), stage=stage, batch_size=4, codebook_init="data", codebook_init_images=12, **steps
    )
    gan = GANConfig(start=1, warmup_steps=1, weight=0.5) if stage == 1 else GANConfig()
    gan.generator = "softplus" if kind == "vfmtok" else "hinge"
    gan.augment_probability, gan.consistency_weight = (0.5, 4.0) if kind == "ideal" else (0.0, 0.0)
    objective = ObjectiveConfig(perceptual=NO_JUDGE, gan=gan, entropy_weight=0.01, **(loss or {}))
    return TokenizerTrainer(tiny(kind, codebook_size=32), Small(12), config, objective)


def moved(before: dict[str, torch.Tensor], model: ImageTokenizer) -> set[str]:
    after = model.state_dict()
    return {name.split(".")[0] for name, tensor in before.items() if not torch.equal(tensor, after[name])}


@pytest.mark.parametrize("kind", KINDS)
def test_stage_1_moves_all_but_the_encoder(kind: str, tmp_path: Any) -> None:
    before = {name: tensor.clone() for name, tensor in tiny(kind, codebook_size=32).state_dict().items()}
    run = trainer(kind, tmp_path)
    run.train()
    rest = {"sampler", "quantizer", "decoder", "pixel_head"}
    assert moved(before, run.tokenizer) == rest
    saved = TOKENIZERS[kind].from_pretrained(tmp_path)
    assert moved(before, saved) == rest and run.gan_trainer is not None


@pytest.mark.parametrize("kind", KINDS)
def test_stage_3_moves_the_decoder_and_no_id(kind: str, tmp_path: Any, pixel_values: torch.Tensor) -> None:
    run = trainer(kind, tmp_path, stage=3)
    before = {name: tensor.clone() for name, tensor in run.tokenizer.state_dict().items()}
    run.tokenizer.eval()
    ids = run.tokenizer.encode(pixel_values).ids
    run.config.restart_steps = None
    run.train()
    assert moved(before, run.tokenizer) == {"decoder", "pixel_head"}
    assert torch.equal(run.tokenizer.eval().encode(pixel_values).ids, ids)


@pytest.mark.parametrize("kind", KINDS)
def test_stage_2_is_refused(kind: str, tmp_path: Any) -> None:
    with pytest.raises(UserError, match="keeps its encoder.*train.stage 2"):
        trainer(kind, tmp_path, stage=2)


def test_a_collage_needs_whole_fields(tmp_path: Any) -> None:
    with pytest.raises(UserError, match="32 pixels are no multiple of 3 tokens"):
        trainer("vfmtok", tmp_path, loss={"context_weight": 1.0})
    run = trainer("ideal", tmp_path, loss={"context_weight": 1.0})
    output, patch_mix = run.reconstruct(torch.randn(2, 3, 32, 32), 5)
    assert patch_mix.kept.shape == (2, 16) and patch_mix.latents.shape == output.latents.shape


@pytest.mark.parametrize("kind", KINDS)
def test_groups_of_the_optimizer(kind: str) -> None:
    model = tiny(kind)
    set_trainable(model, 1)
    groups = parameter_groups(model, learning_rate=1e-4, encoder_learning_rate=1e-5)
    plain = {id(p) for g in groups if g.get("weight_decay") == 0.0 for p in g["params"]}
    assert {g["lr"] for g in groups} == {1e-4}
    assert id(model.quantizer.codebook) in plain and id(model.decoder.positions) in plain
    assert id(model.decoder.projection.weight) not in plain

"""IDEAL's training against the released one: the discriminator's schedule, weights and decay, dropout, first values."""

import math
import runpy

import pytest
import torch
from accelerate import Accelerator

from tests.conftest import ROOT
from tests.tokenizer.conftest import tiny
from unimm.config.loading import load_config
from unimm.training.tokenizer.gan_trainer import GANTrainer

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@pytest.mark.parametrize("step", [0, 10_009, 20_000, 20_018, 135_123, 250_228])
def test_ideals_discriminator_follows_the_schedule_of_the_run(step: int) -> None:
    """The released training steps both schedules from step 0: linear over 4 epochs to 1e-4, then a cosine to 1e-5."""
    recipe = runpy.run_path(str(ROOT / "recipes" / "tokenizer.py"))["TokenizerRecipe"]
    settings = load_config(recipe, ROOT / "configs/tokenizer/ideal_siglip2_384.yaml")
    gan, total, warmup = settings.loss.gan, 250_228, 20_018
    begin = settings.train.steps - 2 if step == total else step
    gan.start, gan.discriminator, gan.weights = begin, "patchgan", None
    gan_trainer = GANTrainer(gan, settings.train, 32, Accelerator(cpu=True, mixed_precision="no"))
    for _ in range(2 if step == total else 0):
        gan_trainer.optimizer.step()
        gan_trainer.scheduler.step()
    cosine = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / (total - warmup)))
    expected = 1e-4 * (step / warmup if step < warmup else cosine)
    assert gan_trainer.optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-9)


def test_ideals_discriminator_is_weighed_and_decayed_as_released() -> None:
    recipe = runpy.run_path(str(ROOT / "recipes" / "tokenizer.py"))["TokenizerRecipe"]
    settings = load_config(recipe, ROOT / "configs/tokenizer/ideal_siglip2_384.yaml")
    gan = settings.loss.gan
    assert gan.start == 20_000 and gan.consistency_weight / gan.discriminator_weight == 8.0
    assert (gan.lecam, gan.lecam_weight, gan.weight) == ("elementwise", 0.001, 0.5)
    gan.discriminator, gan.weights = "patchgan", None
    gan_trainer = GANTrainer(gan, settings.train, 32, Accelerator(cpu=True, mixed_precision="no"))
    decays = {
        p.ndim < 2: group["weight_decay"] for group in gan_trainer.optimizer.param_groups for p in group["params"]
    }
    assert decays == {True: 0.0, False: 0.05}
    groups = gan_trainer.optimizer.param_groups
    assert sum(len(group["params"]) for group in groups) == len(list(gan_trainer.discriminator.parameters()))
    assert all((p.ndim < 2) == (group["weight_decay"] == 0) for group in groups for p in group["params"])


def test_ideal_starts_as_its_code_does() -> None:
    """Registers at zero, positions and CLS at width^-0.5."""
    torch.manual_seed(0)
    decoder = tiny("ideal").decoder
    width = decoder.positions.shape[-1]
    assert not decoder.registers.any()
    assert decoder.positions.std().item() == pytest.approx(width**-0.5, rel=0.1)
    assert decoder.cls_position.std().item() == pytest.approx(width**-0.5, rel=0.5)


def test_ideal_drops_what_attention_and_mlp_add() -> None:
    """In training a share of the entries of every residual update is exactly 0; of the fusion, the MLP's alone."""
    torch.manual_seed(0)
    model = tiny("ideal", dropout=0.5).train()
    found: dict[str, float] = {}

    def watch(name: str, module: torch.nn.Module) -> None:
        module.register_forward_hook(lambda _, __, output: found.__setitem__(name, (output == 0).float().mean().item()))

    block = model.decoder.blocks[0]
    for name, module in {
        "attention": block.output_dropout,
        "mlp": block.mlp,
        "fusion attention": model.sampler.attention,
        "fusion mlp": model.sampler.mlp,
    }.items():
        watch(name, module)
    model.reconstruct(torch.randn(2, 3, 32, 32))
    assert found.pop("fusion attention") == 0
    assert found == {name: pytest.approx(0.5, abs=0.1) for name in ("attention", "mlp", "fusion mlp")}
    model.eval().reconstruct(torch.randn(2, 3, 32, 32))
    assert max(found.values()) == 0

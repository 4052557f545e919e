"""Both stages of VQRAE's training: who gets which gradient, what stays as it was, and that a resumed run is the same
run."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from tests.tokenizer.conftest import tiny_vqrae
from unimm.data.image_streams import ImageDataConfig, image_stream
from unimm.errors import UserError
from unimm.tokenizer import VQRAE
from unimm.training.loop.arguments import TokenizerTrainingConfig
from unimm.training.tokenizer.objective import (
    GANConfig,
    ObjectiveConfig,
    PerceptualConfig,
    TokenizerObjective,
    context_loss,
    mix_patches,
)
from unimm.training.tokenizer.parameters import parameter_groups, set_trainable
from unimm.training.tokenizer.trainer import TokenizerTrainer


@pytest.fixture
def pixel_values() -> torch.Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


NO_JUDGE = PerceptualConfig(kind="none")


def touched(model: VQRAE) -> set[str]:
    """The parts that received a gradient that is not zero."""
    names = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    parts = ("encoder", "sampler", "quantizer", "decoder", "pixel_head")
    return {part for part in parts if any(n.startswith(part + ".") for n in names)}


@pytest.mark.parametrize("stage", [1, 2])
def test_gradient_map(stage, pixel_values):
    """Section 3.4 of VQRAE, one term at a time."""
    model = tiny_vqrae().train()
    teacher = torch.randn(3, 16, 32)
    encoder = {"encoder"} if stage == 2 else set()
    expected = {
        "pixel": encoder | {"sampler", "decoder", "pixel_head"},
        "perceptual": encoder | {"sampler", "decoder", "pixel_head"},
        "codebook": {"quantizer"},
        "commitment": encoder | {"sampler"},
        "distillation": encoder,
    }
    set_trainable(model, stage)
    objective = TokenizerObjective(ObjectiveConfig(perceptual=NO_JUDGE))
    for name, parts in expected.items():
        model.zero_grad()
        output = model.reconstruct(pixel_values)
        terms = objective.terms(output, model.denormalize(pixel_values), teacher)
        terms["perceptual"] = output.pixels.sin().mean()
        if terms[name].requires_grad:
            terms[name].backward()
        assert touched(model) == parts, name
    assert not model.quantizer.codebook.requires_grad


def test_the_straight_through_gradient_reaches_the_latents_unchanged(pixel_values):
    model = tiny_vqrae()
    latents = torch.randn(2, 16, 48, requires_grad=True)
    model.quantizer(latents).codes.sum().backward()
    assert torch.equal(latents.grad, torch.ones_like(latents))
    assert model.quantizer.projection.weight.grad is None


def test_the_sum_of_the_terms_has_the_papers_weights(pixel_values):
    model = tiny_vqrae()
    objective = TokenizerObjective(ObjectiveConfig(perceptual=NO_JUDGE))
    output = model.reconstruct(pixel_values)
    pixels = model.denormalize(pixel_values)
    teacher = torch.randn(3, 16, 32)
    terms = objective.terms(output, pixels, teacher)
    by_hand = (
        (output.pixels - pixels).square().mean()
        + (output.codes.detach() - output.latents).square().mean() * 1.25
        + (output.features - teacher).square().mean()
    )
    torch.testing.assert_close(objective.total(terms), by_hand)


@pytest.fixture(autouse=True)
def alone_and_on_one_thread() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)  # another test may have chosen another precision
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Small:
    """Scenes of the shapes data set at 32 px."""

    def __init__(self, length: int) -> None:
        self.images = image_stream(ImageDataConfig(), length, seed=0)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index]["image"].resize((32, 32))}


def trainer(
    output_dir: Any,
    stage: int,
    *,
    stop: int | None = None,
    gan: GANConfig | None = None,
    context_weight: float = 0.0,
    **fields: Any,
) -> TokenizerTrainer:
    """Six steps on the shapes data set at 32 px; `stop` interrupts after that many, at a checkpoint."""
    config = TokenizerTrainingConfig(
        output_dir=str(output_dir),
        stage=stage,
        **{
            "steps": 6,
            "batch_size": 4,
            "warmup_steps": 1,
            "save_steps": 2,
            "log_steps": 2,
            "panel_steps": 6,
            "learning_rate": 1e-3,
        }
        | fields,
    )
    images = Small(max(24, 4 * config.steps))
    objective = ObjectiveConfig(perceptual=NO_JUDGE, gan=gan or GANConfig(), context_weight=context_weight)
    built = TokenizerTrainer(tiny_vqrae(), images, config, objective)
    if stop is not None:
        step, save = built._optimizer_step, built._save

        def stopping(batches: Any) -> Any:
            if built.step == stop:
                raise KeyboardInterrupt
            return step(batches)

        built._optimizer_step, built._save = stopping, save
    return built


@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_resumed_is_uninterrupted_bit_for_bit(tmp_path, stage):
    gan = GANConfig(start=2, warmup_steps=1) if stage == 2 else None
    fields = {"gan": gan, "restart_steps": 3 if stage == 2 else None, "context_weight": stage - 1.0}
    whole = trainer(tmp_path / "whole", stage, **fields)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "cut", stage, stop=3, **fields).train()
    resumed = trainer(tmp_path / "cut", stage, **fields)
    resumed.train()
    assert resumed.step == whole.step == 6
    ours, theirs = resumed.state_dict(), whole.state_dict()
    for part in ("tokenizer", "discriminator", "lecam") if gan else ("tokenizer",):
        assert all(torch.equal(ours[part][k], theirs[part][k]) for k in theirs[part]), part
    assert all(torch.equal(ours["ema"]["shadow"][k], v) for k, v in theirs["ema"]["shadow"].items())
    assert (tmp_path / "cut" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()


def test_stage_1_leaves_the_encoder_and_c_bit_identical(tmp_path):
    before = tiny_vqrae().state_dict()
    run = trainer(tmp_path, 1)
    run.train()
    saved = VQRAE.from_pretrained(tmp_path).state_dict()
    for after in (run.tokenizer.state_dict(), saved):
        assert all(torch.equal(after[k], before[k]) for k in before if k.startswith("encoder."))
        assert torch.equal(after["quantizer.codebook"], before["quantizer.codebook"])
        assert not torch.equal(after["quantizer.projection.weight"], before["quantizer.projection.weight"])
        assert not torch.equal(after["decoder.projection.weight"], before["decoder.projection.weight"])


def test_stage_2_moves_the_encoder_and_never_the_teacher(tmp_path):
    before = tiny_vqrae().encoder.state_dict()
    run = trainer(tmp_path, 2)
    run.train()
    assert all(torch.equal(v, before[k]) for k, v in run.teacher.encoder.state_dict().items())
    assert not torch.equal(
        run.tokenizer.encoder.state_dict()["encoder.layers.0.mlp.fc1.weight"], before["encoder.layers.0.mlp.fc1.weight"]
    )
    assert not any(k.startswith("teacher") for k in run.state_dict()["tokenizer"])


def test_the_discriminator_rests_until_its_start(tmp_path):
    run = trainer(tmp_path, 2, gan=GANConfig(start=6))
    before = {k: v.clone() for k, v in run.gan_trainer.discriminator.state_dict().items()}
    run.train()
    assert all(torch.equal(v, before[k]) for k, v in run.gan_trainer.discriminator.state_dict().items())


def test_groups_of_the_optimizer():
    model = tiny_vqrae()
    set_trainable(model, 2)
    groups = parameter_groups(model, learning_rate=1e-4, encoder_learning_rate=1e-5)
    assert sum(len(g["params"]) for g in groups) == sum(p.requires_grad for p in model.parameters())
    slow = {id(p) for g in groups if g["lr"] == 1e-5 for p in g["params"]}
    assert slow == {id(p) for p in model.encoder.parameters() if p.requires_grad}
    plain = {id(p) for g in groups if g.get("weight_decay") == 0.0 for p in g["params"]}
    assert id(model.quantizer.projection.weight) in plain and id(model.decoder.positions) in plain


def test_codebook_from_data_starts_in_use(tmp_path):
    run = trainer(tmp_path, 1, codebook_init="data", codebook_init_images=24)
    assert torch.equal(run.tokenizer.quantizer.projection.weight, torch.eye(48))


def test_a_loss_that_is_not_finite_names_the_images(tmp_path):
    run = trainer(tmp_path, 1)
    run.tokenizer.pixel_head.projection.bias.data.fill_(float("nan"))
    with pytest.raises(UserError, match=r"step 0 \(pixel\), images 0 to 3"):
        run.train()


def test_asking_for_lpips_without_weights_says_what_to_get():
    with pytest.raises(UserError, match="vgg16"):
        TokenizerObjective(ObjectiveConfig())


def test_a_collage_exchanges_whole_patches_with_the_row_before():
    images = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 3, 8, 12).contiguous()
    patch_mixes, kept = mix_patches([images], patch_size=4, seed=0)
    assert kept.shape == (3, 6) and kept.any() and not kept.all()
    for row in range(3):
        for token in range(6):
            y, x = token // 3 * 4, token % 3 * 4
            expected = row if kept[row, token] else (row - 1) % 3
            assert (patch_mixes[row, :, y : y + 4, x : x + 4] == expected).all()


def test_the_context_term_is_zero_where_ids_depend_on_their_patch_alone():
    torch.manual_seed(0)
    codes, kept = torch.randn(4, 6, 5), torch.rand(4, 6) < 0.5
    own = torch.where(kept[..., None], codes, codes.roll(1, dims=0))
    assert context_loss(own, [codes], kept) == 0
    expected = sum((own + 1 - own).square().flatten().tolist()) / own.numel() / codes.var(dim=(0, 1)).mean()
    torch.testing.assert_close(context_loss(own + 1, [codes], kept), expected)


def context_of(tokenizer: VQRAE, pixel_values: torch.Tensor) -> float:
    mixed, kept = mix_patches([pixel_values], tokenizer.config.patch_size, seed=3)
    with torch.no_grad():
        codes = tokenizer.encode(pixel_values).codes
        return float(context_loss(tokenizer.latents(tokenizer.features(mixed)), [codes], kept))


def test_the_context_term_makes_latents_depend_on_their_patch(tmp_path):
    fields = {"steps": 30, "encoder_learning_rate": 1e-3, "codebook_init": "data", "panel_steps": 30, "save_steps": 30}
    plain = trainer(tmp_path / "plain", 2, **fields)
    held = trainer(tmp_path / "held", 2, context_weight=1.0, **fields)
    for run in (plain, held):
        run.train()
    pixel_values = next(plain._batches(range(4)))
    assert context_of(held.tokenizer, pixel_values) < 0.8 * context_of(plain.tokenizer, pixel_values)


def test_stage_3_moves_the_decoder_and_no_id(tmp_path, pixel_values):
    run = trainer(tmp_path, 3)
    before = {name: tensor.clone() for name, tensor in run.tokenizer.state_dict().items()}
    ids, fingerprint = run.tokenizer.encode(pixel_values).ids, run.tokenizer.fingerprint
    run.train()
    after = run.tokenizer.state_dict()
    moved = {name.split(".")[0] for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert moved == {"decoder", "pixel_head"}
    run.tokenizer.eval()
    assert torch.equal(run.tokenizer.encode(pixel_values).ids, ids) and run.tokenizer.fingerprint == fingerprint


def test_refit_spreads_the_codes_of_the_saved_tokenizer(tmp_path):
    plain = trainer(tmp_path / "plain", 2)
    spread = trainer(tmp_path / "spread", 2, reestimation_rounds=3, codebook_init_images=12)
    for run in (plain, spread):
        run.train()

    def codes_in_use(folder: Any) -> int:
        tokenizer = VQRAE.from_pretrained(folder).eval()
        return len(torch.cat([tokenizer.encode(b).ids for b in plain._batches(range(24))]).unique())

    assert codes_in_use(tmp_path / "spread") > codes_in_use(tmp_path / "plain")


def test_tf32_is_set_if_asked_for(tmp_path: Path) -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        trainer(tmp_path / "1", 1)
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before
        trainer(tmp_path / "2", 1, tf32=True)
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("high", True)
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]

"""Every recipe: k micro-batches of n samples leave behind what one batch of k x n does."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from eval.bench_accumulation import CASES, differences, left_behind, train
from tests.conftest import ROOT
from tests.tokenizer.conftest import tiny_vqrae
from tests.training.tokenizer.test_trainer import NO_JUDGE, Small
from unimm.training.loop.arguments import TokenizerTrainingConfig
from unimm.training.loop.global_batch import micro_batch
from unimm.training.tokenizer.discriminator import DinoHead, LocalBatchNorm
from unimm.training.tokenizer.gan_trainer import GANTrainer
from unimm.training.tokenizer.objective import GANConfig, ObjectiveConfig
from unimm.training.tokenizer.trainer import TokenizerTrainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where every case has run with one batch a step, as runs/debug/CASE."""
    folder, here, threads = tmp_path_factory.mktemp("accumulation"), Path.cwd(), torch.get_num_threads()
    os.chdir(folder)
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        for case in CASES:
            train(case, 1, ROOT, Path("runs/debug", case))
        yield folder
    finally:
        os.chdir(here)
        torch.set_num_threads(threads)
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_micro_batches_leave_behind_what_the_whole_batch_does(folder: Path, case: str) -> None:
    whole = left_behind(Path("runs/debug", case))
    assert len(whole) > 50 and sum(bool(whole[name].any()) for name in whole if "exp_avg" in name) > 10  # it did learn
    for k in (2, 3, 4):
        train(case, k, ROOT, Path(f"runs/{k}", case))
        far = differences(whole, left_behind(Path(f"runs/{k}", case)))
        wrong = {name: value for name, value in far.items() if not value <= 1e-5}
        assert not wrong, (k, sorted(wrong.items(), key=lambda item: -item[1])[:10])


def small_run(folder: Path, k: int, **gan: Any) -> TokenizerTrainer:
    """Stage 2 of a tiny tokenizer with everything that looks at a whole batch, on batches of 12 in `k` parts."""
    settings = GANConfig(start=1, warmup_steps=1, augment_probability=0.8, consistency_weight=1.0, weight=0.5, **gan)
    objective = ObjectiveConfig(
        perceptual=NO_JUDGE, gan=settings, context_weight=1.0, entropy_weight=0.1, entropy_temperature=0.5
    )
    config = TokenizerTrainingConfig(
        output_dir=str(folder / str(k)), stage=2, steps=3, batch_size=12 // k, gradient_accumulation_steps=k,
        warmup_steps=1, learning_rate=1e-3, encoder_learning_rate=1e-3, adam_epsilon=1e-4, mixed_precision="no",
        restart_steps=2, report_to=[],
    )  # fmt: skip
    torch.manual_seed(0)
    run = TokenizerTrainer(tiny_vqrae(), Small(36), config, objective)
    batches = run._batches(run._remaining())
    run.tokenizer.train()
    for _ in range(3):
        run._optimizer_step(batches)
    return run


def tensors(state: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(state, Tensor):
        yield name, state.float()
    elif isinstance(state, dict | list | tuple):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            if key != "rng":
                yield from tensors(value, f"{name}/{key}")


@pytest.mark.slow
@pytest.mark.parametrize("lecam", ["mean", "elementwise"])
def test_a_gan_in_micro_batches_moves_every_part_as_the_whole_batch(
    tmp_path: Path, lecam: str, fresh_accelerator: None
) -> None:
    whole = dict(tensors(small_run(tmp_path, 1, lecam=lecam, lecam_weight=1.0).state_dict()))
    start = tiny_vqrae().state_dict()
    moved = [float((whole[f"/tokenizer/{name}"] - start[name]).abs().max()) for name in start]
    assert max(moved) > 1e-3 and whole["/lecam/real_ema"] != 0
    for k in (2, 3, 4):
        parts = dict(tensors(small_run(tmp_path, k, lecam=lecam, lecam_weight=1.0).state_dict()))
        far = differences(whole, parts)
        wrong = {name: value for name, value in far.items() if not value <= 1e-5}
        assert not wrong, (k, sorted(wrong.items(), key=lambda item: -item[1])[:5])


def test_spectral_norms_iterate_as_often_in_micro_batches(
    monkeypatch: pytest.MonkeyPatch, fresh_accelerator: None
) -> None:
    """The heads of the DINO discriminator, whose norm is of one sample here as its groups are of a micro-batch."""

    class Heads(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = DinoHead()
            for module in self.modules():
                if isinstance(module, LocalBatchNorm):
                    module.virtual_batch_size = 1

        def forward(self, pixels: Tensor) -> Tensor:
            return self.head(pixels.flatten(1).unfold(1, 384, 96).mT)

    monkeypatch.setattr("unimm.training.tokenizer.gan_trainer.build_discriminator", lambda *_: Heads())
    real, fake = torch.rand(2, 12, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = {}
    for k in (1, 3, 4):
        torch.manual_seed(0)
        gan = GANConfig(start=0, warmup_steps=0, augment_probability=1.0, consistency_weight=1.0, lecam_weight=1.0)
        config = TokenizerTrainingConfig(output_dir="unused", steps=4, adam_epsilon=1e-4, mixed_precision="no")
        gan_trainer = GANTrainer(gan, config, 16, Accelerator(cpu=True, mixed_precision="no"))
        for step in range(3):
            for index, pixels in enumerate(fake.chunk(k)):
                with micro_batch(index, k):
                    gan_trainer.generator_loss(pixels, step, last=index == k - 1)
            gan_trainer.step(real.chunk(k), fake.chunk(k), step)
        found[k] = dict(tensors(gan_trainer.state_dict()))
    for k in (3, 4):
        assert max(differences(found[1], found[k]).values()) <= 1e-5
    assert any("_u" in name for name in found[1])

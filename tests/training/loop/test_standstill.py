"""A run whose trained part does not move stops with one sentence; one that moves, or rests rightly, does not."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.training.language_model.test_trainer import BOTH, build
from tests.training.tokenizer.test_trainer import trainer
from unimm.errors import UserError
from unimm.training.loop.standstill import StandstillGuard
from unimm.training.tokenizer.objective import GANConfig

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def guarded(**rates: float) -> tuple[nn.ModuleDict, torch.optim.Optimizer, StandstillGuard]:
    """Two parts with a rate each, and their guard."""
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in rates})
    groups = [{"params": list(model[name].parameters()), "lr": rate} for name, rate in rates.items()]
    optimizer = torch.optim.SGD(groups)
    return model, optimizer, StandstillGuard(model, optimizer, "The model's")


def step(model: nn.ModuleDict, optimizer: torch.optim.Optimizer, guard: StandstillGuard, *moving: str) -> None:
    optimizer.zero_grad()
    for name in moving:
        model[name](torch.ones(1, 4)).sum().backward()
    guard.begin_step()
    optimizer.step()


def test_a_part_without_gradients_is_named_after_three_steps() -> None:
    parts = guarded(head=0.1, body=0.1)
    for number in range(1, 3):
        step(*parts, "head")
        parts[2].check(number)
    step(*parts, "head")
    with pytest.raises(UserError, match=r"^The model's body did not move in the last 3 steps up to step 3, though"):
        parts[2].check(3)


def test_a_rate_of_zero_a_rest_and_a_skipped_step_are_no_standstill() -> None:
    still = guarded(head=0.1, body=0.0)
    resting, skipped = guarded(head=0.1, body=0.1), guarded(head=0.1, body=0.1)
    for number in range(1, 9):
        step(*still, "head")
        still[2].check(number)
        step(*resting, "head")
        resting[2].check(number, {"body"})
        step(*skipped)
        skipped[2].skip_step()
        skipped[2].check(number)


def test_a_part_that_stops_later_is_found_in_the_next_window() -> None:
    parts = guarded(head=0.1)
    for _ in range(5):
        step(*parts, "head")
    parts[2].check(5)
    for _ in range(5):
        step(*parts)
    with pytest.raises(UserError, match="head did not move in the last 5 steps up to step 10"):
        parts[2].check(10)


@pytest.mark.parametrize(("part", "named"), [("optimizer", "The tokenizer's"), ("adversary", "The discriminator's")])
def test_a_tokenizers_run_stops_when_it_stands_still(tmp_path: Path, part: str, named: str) -> None:
    run = trainer(tmp_path, 2, gan=GANConfig(start=0, warmup_steps=0), log_steps=4, mixed_precision="no")
    owner: Any = run if part == "optimizer" else run.gan_trainer
    owner.optimizer.step = lambda: None
    with pytest.raises(UserError, match=rf"^{named} \w+ did not move in the last [34] steps up to step 4"):
        run.train()
    assert not (tmp_path / "model.safetensors").exists()


def test_a_language_models_run_stops_when_a_part_stands_still(tmp_path: Path) -> None:
    run = build(tmp_path, BOTH, max_steps=6, logging_steps=4)
    for parameter in run.model.model.multi_modal_projector.parameters():
        parameter.register_hook(torch.zeros_like)
    run.args.weight_decay = 0.0
    with pytest.raises(UserError, match=r"^model\.multi_modal_projector did not move in the last [34] steps"):
        run.run()

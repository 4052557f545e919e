"""The warm-up of the new rows: what moves in it, and that text is as it was, to the bit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.language_model.test_trainer import BOTH, TALK, StopAt, build
from unimm.training.language_model.trainer import HostTrainer


def run(folder: Path, **arguments: Any) -> tuple[HostTrainer, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    options = {"max_steps": 3, "save_strategy": "no", "weight_decay": 0.1, "ema_decay": 0.5} | arguments
    trainer = build(folder, BOTH, **options)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    return trainer, before, dict(trainer.model.named_parameters())


@pytest.mark.parametrize("muon", [False, True])
def test_only_the_new_rows_move_in_the_warm_up(tmp_path: Path, muon: bool) -> None:
    trainer, before, after = run(tmp_path, new_rows_warmup_steps=3, use_muon=muon)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"model.language_model.embed_tokens.weight"}
    rows = (before[next(iter(moved))] != after[next(iter(moved))]).any(1).nonzero()[:, 0].tolist()
    new = trainer.model.trainable_token_indices()["embed_tokens"]
    assert set(rows) <= set(new) and len(rows) > 16
    averages = trainer.ema.shadow
    others = {name for name in averages if name not in moved}
    assert others and all(torch.equal(averages[name], before[name]) for name in others)


def test_everything_moves_after_it_with_weight_decay_back(tmp_path: Path) -> None:
    trainer, before, after = run(tmp_path, new_rows_warmup_steps=2)
    learning = {name for name, p in after.items() if p.requires_grad}
    assert {name for name in learning if not torch.equal(before[name], after[name])} == learning
    (tables,) = [group for group in trainer.optimizer.param_groups if group.get("tables")]
    assert tables["weight_decay"] == 0.1
    assert trainer.optimizer.state[tables["params"][0]]["step"] == 1  # it began anew with the text rows


def test_a_run_stopped_in_the_warm_up_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    options = {"new_rows_warmup_steps": 3, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole, _, _ = run(tmp_path / "whole", **options)
    cut = build(tmp_path / "cut", BOTH, weight_decay=0.1, ema_decay=0.5, **options)
    cut.add_callback(StopAt(2))
    cut.train_or_load()
    again = build(tmp_path / "cut", BOTH, weight_decay=0.1, ema_decay=0.5, **options)
    again.train_or_load()
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_projector_moves_at_its_own_rate(tmp_path: Path) -> None:
    trainer = build(tmp_path, TALK, max_steps=1, save_strategy="no", projector_learning_rate=0.0, weight_decay=0.0)
    projector = trainer.model.model.multi_modal_projector
    before = [p.detach().clone() for p in projector.parameters()]
    trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before, projector.parameters(), strict=True))
    assert {group["initial_lr"] for group in trainer.optimizer.param_groups} == {1e-2, 0.0}

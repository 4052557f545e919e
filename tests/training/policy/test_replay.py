"""Replayed samples: learned as `t2i.py` learns them, beside the rewards."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.language_model.test_trainer import StopAt
from tests.training.language_model.tiny_host import tiny_host
from tests.training.policy.test_trainer import BOTH, build, logged, weights
from unimm.data.mixture import FlowConfig, Mixture, MixtureConfig
from unimm.data.text.collators import FlowCollator
from unimm.errors import UserError
from unimm.training.language_model.trainer import HostTrainer
from unimm.training.loop.arguments import HostTrainingArguments
from unimm.training.policy.replay import Replay, ReplayConfig

FLOWS = MixtureConfig({"talk": FlowConfig("conversation", num_turns=(1, 2)), "draw": FlowConfig("drawing", weight=0.5)})
CALM = {"reward": lambda prompts, *rest: [0.1] * len(prompts), "watch": {"window": 9}}  # no gradient of rewards


def replay(size: int = 4, weight: float = 1.0) -> ReplayConfig:
    return ReplayConfig(FLOWS, weight=weight, batch_size=size)


def test_without_signal_a_step_is_that_of_supervised_training(tmp_path: Path) -> None:
    """The same samples through the trainer of t2i.py: the same losses and weights."""
    settings: dict[str, Any] = {"max_steps": 2, "learning_rate": 1e-2, "save_strategy": "no", "logging_steps": 1}
    learned = build(tmp_path / "1", replay=replay(), **CALM, **settings)
    before = weights(learned)
    learned.run()
    torch.manual_seed(0)
    model, processor = tiny_host()
    model.config.null_prompt = processor.null_prompt_ids()
    common = {"per_device_train_batch_size": 4, "bf16": False, "report_to": [], "disable_tqdm": True}
    supervised = HostTrainer(
        model,
        HostTrainingArguments(str(tmp_path / "2"), **settings, **common),
        processor=processor,
        data_collator=FlowCollator(processor),
        train_dataset=Mixture(FLOWS, samples_per_step=4),
        flow_weights=FLOWS.weights,
    )
    supervised.run()
    for flow in FLOWS.flows:
        assert logged(learned, f"replay/loss_{flow}") == pytest.approx(logged(supervised, f"loss_{flow}"), abs=2e-4)
    after = weights(supervised)
    assert before.keys() == after.keys()
    for name, value in weights(learned).items():
        assert (value - after[name]).abs().max() < 1e-5, name
    assert any(not torch.equal(before[name], value) for name, value in after.items())


def test_accumulated_micro_batches_are_one_batch(tmp_path: Path) -> None:
    common = {"max_steps": 2, "save_strategy": "no"}
    whole = build(tmp_path / "1", BOTH, replay=replay(8, 0.3), per_device_train_batch_size=4, **common)
    parts = build(
        tmp_path / "2",
        BOTH,
        replay=replay(4, 0.3),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        **common,
    )
    whole.run()
    parts.run()
    for (name, one), other in zip(weights(whole).items(), weights(parts).values(), strict=True):
        assert (one - other).abs().max() < 1e-5, name


def test_a_resumed_run_is_bit_identical(tmp_path: Path) -> None:
    common = {"save_steps": 1, "max_steps": 3, "replay": replay()}
    straight = build(tmp_path / "straight", BOTH, **common)
    straight.run()
    first = build(tmp_path / "cut", BOTH, **common)
    first.add_callback(StopAt(2))
    first.train_or_load()
    resumed = build(tmp_path / "cut", BOTH, **common)
    resumed.run()
    for (name, one), other in zip(weights(straight).items(), weights(resumed).values(), strict=True):
        assert torch.equal(one, other), name


def test_processes_share_the_samples_of_a_step() -> None:
    _, processor = tiny_host()
    found = Replay(replay(4), processor)
    together = Replay(replay(8), processor).batches(3, 1, 0, 1)[0]
    apart = [found.batches(3, 1, rank, 2)[0] for rank in range(2)]
    for flow in FLOWS.flows:
        labels = sum(len(batch[flow]["labels_at"]) for batch in apart)
        assert labels == len(together[flow]["labels_at"])


def test_a_batch_without_a_flow_is_refused() -> None:
    _, processor = tiny_host()
    with pytest.raises(UserError, match="A batch of 1 replayed samples holds none of '(draw|talk)': raise"):
        Replay(replay(1), processor).batches(0, 2, 0, 1)

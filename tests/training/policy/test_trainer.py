"""The trainer on tiny models: ratios, divergence, accumulation, exact zeros, resuming, and what ends a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.training.language_model.test_trainer import StopAt
from tests.training.language_model.tiny_host import tiny_host
from unimm.data.tasks import TaskFlow, Tasks, TasksConfig
from unimm.errors import UserError
from unimm.sampling import ImageSampling
from unimm.training.language_model.adapters import LoraSettings, add_lora
from unimm.training.loop.arguments import HostTrainingArguments
from unimm.training.policy.reference import Reference
from unimm.training.policy.replay import Replay, ReplayConfig
from unimm.training.policy.rewarding import Rewards
from unimm.training.policy.settings import PolicyConfig, WatchConfig
from unimm.training.policy.trainer import PolicyTrainer

DRAW = {"drawing": TaskFlow("drawing")}
BOTH = {"drawing": TaskFlow("drawing", 0.5), "answering": TaskFlow("answering", 0.5)}
GUIDED = ImageSampling(temperature=0.9, guidance_scale=2.0)


def brightness(
    prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]], images: Sequence[Image.Image]
) -> list[float]:
    return [float(np.asarray(image).mean()) / 2.55 for image in images]  # in percent: a random decoder has little range


def length(expected: Sequence[str], answers: Sequence[str]) -> list[float]:
    """A reward that random weights can earn."""
    return [float(len(answer)) for answer in answers]


def build(
    folder: Path,
    flows: dict[str, TaskFlow] | None = None,
    *,
    policy: dict[str, Any] | None = None,
    watch: dict[str, Any] | None = None,
    reward: Any = brightness,
    judge: Any = None,
    num_eval_samples: int = 0,
    lora: LoraSettings | None = None,
    replay: ReplayConfig | None = None,
    **arguments: Any,
) -> PolicyTrainer:
    torch.manual_seed(0)
    model, processor = tiny_host()
    model.config.null_prompt = processor.null_prompt_ids()
    adapter = add_lora(model, lora, base=str(folder)) if lora else None
    config = PolicyConfig(**{"group_size": 4, "sampling": GUIDED, "max_answer_tokens": 3, **(policy or {})})
    defaults = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "disable_tqdm": True}
    defaults |= {"save_steps": 2, "logging_steps": 1, "bf16": False, "report_to": []}
    train = HostTrainingArguments(str(folder), **{**defaults, **arguments})
    data = TasksConfig(flows or DRAW, num_eval_samples=num_eval_samples)
    return PolicyTrainer(
        model,
        train,
        processor=processor,
        tasks=Tasks(data, repeats=config.iterations, samples_per_step=train.samples_per_step),
        held_out=Tasks(data, split="test") if num_eval_samples else None,
        policy=config,
        watch=WatchConfig(**(watch or {})),
        rewards=Rewards({"reward": reward}, {"reward": 1.0}, length, judge),
        reference=Reference(model, adapter) if config.kl_weight or num_eval_samples else None,
        replay=Replay(replay, processor) if replay else None,
        adapter=adapter,
    )


def weights(trainer: PolicyTrainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters() if value.requires_grad}


def logged(trainer: PolicyTrainer, name: str) -> list[float]:
    return [line[name] for line in trainer.state.log_history if name in line]


@pytest.mark.parametrize(
    "lora",
    [None, pytest.param(LoraSettings(r=2, alpha=4, dropout=0.0, dtype="float32"), marks=pytest.mark.slow)],
    ids=["full", "lora"],
)
def test_the_first_step_on_samples_has_ratio_one_and_later_steps_do_not(
    lora: LoraSettings | None, tmp_path: Path
) -> None:
    trainer = build(tmp_path, BOTH, policy={"iterations": 2, "kl_weight": 0.05}, lora=lora)
    trainer.run()
    for flow in BOTH:
        errors, kl = logged(trainer, f"{flow}/ratio_error"), logged(trainer, f"{flow}/kl")
        assert errors[0] == errors[2] == 0.0 and errors[1] > 0 and errors[3] > 0
        assert abs(kl[0]) < 1e-6 and kl[1] > 0  # the reference's forward is not the trained one's to the last bit
        rewards = logged(trainer, f"{flow}/reward")
        assert len(rewards) == 2  # sampled twice
    assert logged(trainer, "drawing/length") == [16.0, 16.0]


def test_the_reference_is_where_the_live_model_is() -> None:
    """It is copied first, and the trainer then moves the live model to the GPU."""
    model, _ = tiny_host()
    reference = Reference(model)
    model.to("meta")
    with reference.model() as frozen:
        assert {each.device.type for each in frozen.parameters()} == {"meta"}


@pytest.mark.slow
def test_accumulated_micro_batches_are_one_batch(tmp_path: Path) -> None:
    policy = {"kl_weight": 0.02, "entropy_weight": 0.01, "loss_type": "dapo"}
    common = {"max_steps": 2, "policy": policy, "save_strategy": "no"}
    whole = build(tmp_path / "1", BOTH, per_device_train_batch_size=4, **common)
    parts = build(tmp_path / "2", BOTH, per_device_train_batch_size=2, gradient_accumulation_steps=2, **common)
    before = weights(whole)
    whole.run()
    parts.run()
    for (name, one), other in zip(weights(whole).items(), weights(parts).values(), strict=True):
        assert (one - other).abs().max() < 1e-5, name
    assert any(not torch.equal(before[name], value) for name, value in weights(whole).items())
    assert logged(whole, "drawing/reward") == pytest.approx(logged(parts, "drawing/reward"), abs=1e-6)


@pytest.mark.parametrize("stop", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_a_resumed_run_is_bit_identical(stop: int, tmp_path: Path) -> None:
    """Also between two steps on the same samples (stop 3 of pairs)."""
    common = {"policy": {"iterations": 2, "kl_weight": 0.02}, "save_steps": 1, "ema_decay": 0.9, "max_steps": 5}
    straight = build(tmp_path / "straight", BOTH, **common)
    straight.run()
    first = build(tmp_path / "cut", BOTH, **common)
    first.add_callback(StopAt(stop))
    first.train_or_load()
    assert first.state.global_step == stop
    resumed = build(tmp_path / "cut", BOTH, **common)
    resumed.run()
    for (name, one), other in zip(weights(straight).items(), weights(resumed).values(), strict=True):
        assert torch.equal(one, other), name
    assert all(map(torch.equal, straight.ema.shadow.values(), resumed.ema.shadow.values()))  # type: ignore[union-attr]
    assert logged(straight, "drawing/reward") == logged(resumed, "drawing/reward")


def test_equal_rewards_give_gradients_of_exactly_zero_and_end_the_run(tmp_path: Path) -> None:
    trainer = build(tmp_path, reward=lambda prompts, *rest: [0.1] * len(prompts), watch={"window": 3}, max_steps=9)
    before = weights(trainer)
    with pytest.raises(UserError, match="(All gradients were exactly zero|Every group had equal rewards) in 3 steps"):
        trainer.run()
    assert trainer.state.global_step in (2, 3)
    assert all(torch.equal(before[name], value) for name, value in weights(trainer).items())
    assert set(logged(trainer, "grad_norm")) == {0.0}


def test_a_constant_group_adds_nothing_to_a_batch(tmp_path: Path) -> None:
    """Its rows are left out of the forward; with an entropy bonus of almost nothing they are in it."""

    def half(prompts: Sequence[str], metadata: Any, images: Sequence[Image.Image]) -> list[float]:
        found = brightness(prompts, metadata, images)
        return [value if n < len(found) // 2 else 0.1 for n, value in enumerate(found)]

    common = {"reward": half, "max_steps": 1, "save_strategy": "no"}
    left_out = build(tmp_path / "1", **common)
    computed = build(tmp_path / "2", policy={"entropy_weight": 1e-30}, **common)
    rows = []
    for trainer in (left_out, computed):
        trainer.run()
        rows.append(len(trainer.window[0]["drawing"].chosen))
    assert rows == [8, 16]
    for (name, one), other in zip(weights(left_out).items(), weights(computed).values(), strict=True):
        assert (one - other).abs().max() < 1e-5, name


def test_a_divergence_above_the_limit_ends_the_run(tmp_path: Path) -> None:
    trainer = build(tmp_path, policy={"kl_weight": 1e-6}, watch={"max_kl": 1e-3}, learning_rate=0.1, max_steps=9)
    with pytest.raises(UserError, match=r"The KL divergence from the starting model is .* and watch.max_kl 0.001"):
        trainer.run()


@pytest.mark.slow
def test_a_reward_that_rises_while_the_judge_falls_ends_the_run(tmp_path: Path) -> None:
    trainer = build(
        tmp_path,
        judge=lambda *given: [-value for value in brightness(*given)],
        num_eval_samples=16,
        eval_strategy="steps",
        eval_steps=4,
        eval_on_start=True,
        max_steps=60,
        per_device_train_batch_size=8,
        watch={"max_judge_drop": 0.1, "max_kl": 1e9},
    )
    with pytest.raises(UserError, match="rose from .* and the judge's score fell .* exploited"):
        trainer.run()
    assert trainer.state.log_history[0]["eval_judge"] == pytest.approx(-trainer.state.log_history[0]["eval_reward"])


@pytest.mark.slow
def test_the_reward_rises_on_held_out_prompts(tmp_path: Path) -> None:
    trainer = build(
        tmp_path,
        BOTH,
        num_eval_samples=32,
        eval_strategy="steps",
        eval_steps=40,
        eval_on_start=True,
        max_steps=40,
        per_device_train_batch_size=8,
        save_strategy="no",
        ema_decay=0.5,
        watch={"max_kl": 1e9},
    )
    trainer.run()
    before, after = logged(trainer, "eval_reward")
    spread = logged(trainer, "drawing/reward_std")[0]
    assert after > before + spread  # of one image; that of the mean of 32 is a sixth of it
    divergence = logged(trainer, "eval_kl")
    assert abs(divergence[0]) < 1e-6 < divergence[1]
    answers = logged(trainer, "answering/reward")
    assert np.mean(answers[-5:]) > np.mean(answers[:5]) + 0.5
    assert logged(trainer, "eval_answers") and len(trainer.held_out.shown) == 8  # type: ignore[union-attr]


def test_edits_are_rewarded_too(tmp_path: Path) -> None:
    """Their source images reach the projector, which drawings alone leave as it was."""
    flows = {"drawing": TaskFlow("drawing", 0.5), "editing": TaskFlow("editing", 0.5)}
    evaluation = {"num_eval_samples": 4, "eval_strategy": "steps", "eval_steps": 2, "watch": {"max_kl": 1e9}}
    trainer = build(tmp_path, flows, max_steps=2, save_strategy="no", **evaluation)
    before = weights(trainer)
    trainer.run()
    moved = [name for name, value in weights(trainer).items() if not torch.equal(value, before[name])]
    assert any("multi_modal_projector" in name for name in moved)
    for flow in flows:
        assert logged(trainer, f"{flow}/reward") and logged(trainer, f"{flow}/reward_reward")
        assert logged(trainer, f"{flow}/ratio_error") == [0.0, 0.0]
    assert len(trainer.held_out.tasks) == 8 and logged(trainer, "eval_edits") != logged(trainer, "eval_reward")  # type: ignore[union-attr]


@pytest.mark.slow
def test_samples_of_another_batch_are_refused_between_two_steps_on_them(tmp_path: Path) -> None:
    common = {"policy": {"iterations": 2}, "save_steps": 1}
    first = build(tmp_path, **common)
    first.add_callback(StopAt(1))
    first.train_or_load()
    other = build(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, **common)
    with pytest.raises(UserError, match="holds samples for 1 micro-batches and this run takes 2"):
        other.run()


def test_rewards_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    trainer = build(tmp_path, reward=lambda prompts, *rest: [float("nan")] * len(prompts))
    with pytest.raises(UserError, match="The reward reward is not finite for 16 of 16 images"):
        trainer.run()

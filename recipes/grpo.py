"""Learn from rewards (GRPO): improve a unified model by rewards of the images that it draws and the answers it gives.

    accelerate launch --num_cpu_threads_per_process 2 recipes/grpo.py --config configs/grpo/shapes.yaml

Starts from a model that draws, such as the output of `t2i.py`. Rerunning the command resumes from the last checkpoint.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import IntervalStrategy
from transformers.trainer_utils import set_seed

from unimm.config.loading import parse_recipe_args
from unimm.data.conversations import DRAWN_KINDS
from unimm.data.presence import require_sources
from unimm.data.tasks import Tasks, TasksConfig
from unimm.errors import UserError, require_place, run_main
from unimm.evaluation.metrics.answers import same_answer
from unimm.mllm import load
from unimm.rewards import RewardConfig, build_reward, build_rewards
from unimm.training.language_model.adapters import Adapter, LoraSettings, add_lora
from unimm.training.loop.arguments import HostTrainingArguments
from unimm.training.loop.run import open_run
from unimm.training.policy.reference import Reference
from unimm.training.policy.replay import Replay, ReplayConfig
from unimm.training.policy.rewarding import Rewards
from unimm.training.policy.settings import PolicyConfig, WatchConfig
from unimm.training.policy.trainer import PolicyTrainer


@dataclass
class GRPOModelConfig:
    """The unified model to improve.

    Args:
        path: folder or hub id ("default": the one shipped with the library).
        attn_implementation: as in transformers.
    """

    path: str
    attn_implementation: str | None = None


@dataclass
class GRPORecipe:
    """Settings of a run.

    Args:
        rewards: by name; their weighted sum is what images are rewarded with. Answers get 1 if they are right.
        judge: scores the images of evaluations beside the reward, see `WatchConfig.max_judge_drop`.
        replay: samples with labels that are learned beside the rewards, so that nothing else is forgotten.
    """

    model: GRPOModelConfig
    data: TasksConfig
    train: HostTrainingArguments
    rewards: dict[str, RewardConfig] = field(default_factory=dict)
    judge: RewardConfig | None = None
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    replay: ReplayConfig | None = None
    lora: LoraSettings | None = None

    def __post_init__(self) -> None:
        draws = any(flow.kind in DRAWN_KINDS for flow in self.data.flows.values())
        if draws and not any(reward.weight > 0 for reward in self.rewards.values()):
            raise UserError(
                "data.flows has images to draw or edit and rewards has none with a weight above 0: add one."
            )
        if self.rewards and not draws:
            raise UserError(
                "rewards are for drawn images, and data.flows has no kind: drawing or editing; leave them out."
            )
        if self.lora is not None and self.lora.dropout > 0:
            raise UserError(
                f"lora.dropout is {self.lora.dropout}, and log-probabilities with it are not those that were sampled: "
                "set it to 0."
            )
        if self.train.eval_strategy != IntervalStrategy.NO and not self.data.num_eval_samples:
            raise UserError("train.eval_strategy needs held-out tasks, and data.num_eval_samples is 0: raise it.")


def right_answers(expected: Sequence[str], answers: Sequence[str]) -> list[float]:
    """Return 1.0 for each right answer, else 0.0, by the rule of the benchmarks."""
    return [float(same_answer(given, wanted)) for wanted, given in zip(expected, answers, strict=True)]


def build_trainer(recipe: GRPORecipe, model: Any, processor: Any, adapter: Adapter | None = None) -> PolicyTrainer:
    """Build rewards, tasks and trainer around a model."""
    own = any(each and each.kind == "own_answers" for each in (*recipe.rewards.values(), recipe.judge))
    compared = own or recipe.policy.kl_weight or recipe.data.num_eval_samples
    reference = Reference(model, adapter) if compared else None
    start = None if reference is None else reference.model
    made = build_rewards(recipe.rewards, processor, start)
    judge = None if recipe.judge is None else build_reward(recipe.judge, processor, start)
    return PolicyTrainer(
        model,
        recipe.train,
        processor=processor,
        tasks=Tasks(recipe.data, repeats=recipe.policy.iterations, samples_per_step=recipe.train.samples_per_step),
        held_out=Tasks(recipe.data, split="test") if recipe.data.num_eval_samples else None,
        policy=recipe.policy,
        watch=recipe.watch,
        rewards=Rewards(
            images={name: reward.score for name, reward in made.items()},
            weights={name: reward.weight for name, reward in recipe.rewards.items()},
            answers=right_answers,
            judge=judge.score if judge is not None else None,
        ),
        reference=reference,
        replay=None if recipe.replay is None else Replay(recipe.replay, processor),
        adapter=adapter,
    )


def require_inputs(recipe: GRPORecipe) -> None:
    """Raise UserError if a model or file of the recipe does not exist, or a setting is of no use, before anything is
    loaded."""
    for setting in ("pack_length", "max_length"):
        if getattr(recipe.train, setting) is not None:
            raise UserError(f"train.{setting} is for conversations, and samples are never cut: leave it out.")
    require_place("The model model.path", recipe.model.path)
    named = {f"rewards.{name}": reward for name, reward in recipe.rewards.items()}
    named |= {} if recipe.judge is None else {"judge": recipe.judge}
    for name, reward in named.items():
        reward.require(name)
    if recipe.replay is not None:
        require_sources(recipe.replay.data)
    for name, flow in recipe.data.flows.items():
        for setting in ("source", "eval_source"):
            path = getattr(flow, setting)
            if path not in (None, "shapes") and not Path(path).is_file():
                raise UserError(f"data.flows.{name}.{setting}: there is no file {path}.")


def main() -> None:
    recipe = parse_recipe_args(GRPORecipe)
    require_inputs(recipe)
    set_seed(recipe.train.seed)
    how = {"dtype": torch.float32, "attn_implementation": recipe.model.attn_implementation}
    how |= recipe.lora.loading() if recipe.lora else {}
    model, processor = load(recipe.model.path, device="cpu", **how)
    adapter = add_lora(model, recipe.lora, base=recipe.model.path) if recipe.lora else None
    trainer = build_trainer(recipe, model, processor, adapter)
    rows = dict(trainer.train_dataset.sizes)
    if trainer.replay is not None:
        rows |= {f"replay.{name}": count for name, count in trainer.replay.mixture.sizes.items()}
    with open_run(recipe, samples_per_step=recipe.train.samples_per_step, rows=rows):
        trainer.run()


if __name__ == "__main__":
    sys.exit(run_main(main, name="grpo"))

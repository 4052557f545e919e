"""Rules that end a run which learns nothing, or the wrong thing."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import TrainerCallback

from unimm.errors import UserError
from unimm.training.policy.settings import WatchConfig

INTACT = "checkpoints written before are intact."


class Watch(TrainerCallback):
    """Counts steps without a gradient and without a signal, and compares evaluations with the first one; raises
    UserError when a limit is reached."""

    def __init__(self, config: WatchConfig) -> None:
        self.config = config
        self.without_gradient = self.without_signal = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        """Count the steps in a row in which every gradient is exactly zero."""
        largest = [weight.grad.detach().abs().amax() for weight in model.parameters() if weight.grad is not None]
        self.gradient(float(torch.stack(largest).amax()) if largest else 0.0, state.global_step + 1)

    def gradient(self, largest: float, step: int) -> None:
        """Take the largest absolute gradient of a step."""
        self.without_gradient = 0 if largest > 0 else self.without_gradient + 1
        if self.without_gradient >= self.config.window:
            raise UserError(
                f"All gradients were exactly zero in {self.without_gradient} steps up to step {step}: the policy "
                "learns nothing. Every group had equal rewards, or no token was counted: raise the temperature or "
                f"policy.group_size, take other tasks or a finer reward; {INTACT}"
            )

    def signal(self, share_without: float, steps: int, step: int) -> None:
        """Take the share of groups with equal rewards in the last `steps` steps."""
        self.without_signal = self.without_signal + steps if share_without >= 1 else 0
        if self.without_signal >= self.config.window:
            raise UserError(
                f"Every group had equal rewards in {self.without_signal} steps up to step {step}: there is nothing to "
                "learn from. Raise the temperature or policy.group_size, take other tasks or a finer reward; "
                f"{INTACT}"
            )

    def divergence(self, kl: float, step: int) -> None:
        """Take the mean KL divergence of a token from the starting model."""
        if kl > self.config.max_kl:
            raise UserError(
                f"The KL divergence from the starting model is {kl:.3g} a token at step {step}, and watch.max_kl "
                f"{self.config.max_kl}: lower train.learning_rate or raise policy.kl_weight; {INTACT}"
            )

    def evaluation(self, metrics: Mapping[str, float], history: Sequence[Mapping[str, Any]], step: int) -> None:
        """Compare an evaluation with the first one in the log, and look at its divergence."""
        self.divergence(metrics.get("eval_kl", 0.0), step)
        if "eval_judge" not in metrics:
            return
        first = next((line for line in history if "eval_judge" in line), metrics)
        gained = metrics["eval_reward"] - first["eval_reward"]
        lost = first["eval_judge"] - metrics["eval_judge"]
        if gained > 0 and lost >= self.config.max_judge_drop:
            raise UserError(
                f"The reward of held-out prompts rose from {first['eval_reward']:.3f} to {metrics['eval_reward']:.3f} "
                f"by step {step}, and the judge's score fell from {first['eval_judge']:.3f} to "
                f"{metrics['eval_judge']:.3f}: the reward is being exploited. Take a stricter reward, or raise "
                f"policy.kl_weight; {INTACT}"
            )

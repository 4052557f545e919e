"""What samples are worth: functions that a recipe makes of its rewards, and the scores of held-out tasks."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from unimm.data.conversations import DRAWN_KINDS
from unimm.data.tasks import Kind, Task, Tasks
from unimm.errors import UserError
from unimm.training.policy.averages import Averages
from unimm.training.policy.losses import divergence
from unimm.training.policy.reference import Reference
from unimm.training.policy.rollouts import Rollout, Sampler

Score = Callable[[Sequence[str], Sequence[Mapping[str, Any]], Sequence[Image.Image]], list[float]]
"""Scores images, given their prompts and the prompts' metadata: one number for each image."""
Precision = Callable[[], AbstractContextManager[Any]]
PANEL_IMAGES = 8


@dataclass(frozen=True)
class Rewards:
    """The rewards of a run.

    Args:
        images: by name, what scores drawn images; `weights` are their factors in the sum.
        answers: from (expected answers, answers) to the reward of each.
        judge: scores the images of evaluations, beside the reward.
    """

    images: Mapping[str, Score]
    weights: Mapping[str, float]
    answers: Callable[[Sequence[str], Sequence[str]], list[float]]
    judge: Score | None = None

    @property
    def names(self) -> list[str]:
        """Return the names of the rewards of images."""
        return list(self.images)

    def of_images(self, tasks: Sequence[Task], images: Sequence[Image.Image]) -> Tensor:
        """Score one image of each task; return [R, number of rewards] in float64.

        Raises:
            UserError: a score is not finite.
        """
        prompts, metadata = [task["prompt"] for task in tasks], [task["metadata"] for task in tasks]
        parts = []
        for name, score in self.images.items():
            values = torch.tensor(score(prompts, metadata, images), dtype=torch.float64)
            if wrong := int((~torch.isfinite(values)).sum()):
                raise UserError(f"The reward {name} is not finite for {wrong} of {len(images)} images.")
            parts.append(values)
        return torch.stack(parts, dim=1)

    def total(self, parts: Tensor) -> Tensor:
        """Return the weighted sums [R] of scores [R, number of rewards]."""
        return parts @ torch.tensor([self.weights[name] for name in self.names], dtype=torch.float64)


class HeldOut:
    """Draws held-out prompts and edits held-out images, with the same noise every time, and answers held-out questions
    greedily; measures the KL divergence of the drawn tokens from `reference`, if there is one."""

    def __init__(
        self, tasks: Tasks, sampler: Sampler, rewards: Rewards, device: torch.device, reference: Reference | None = None
    ) -> None:
        self.tasks, self.sampler, self.rewards, self.reference = tasks, sampler, rewards, reference
        names = ["reward", *(f"reward_{name}" for name in rewards.names), "judge", "edits", "answers", "kl"]
        self.averages = Averages(names, device)
        self.shown: list[Image.Image] = []

    def score(self, rank: int, processes: int, sampling: Precision, training: Precision) -> Averages:
        """Score this process's share of the tasks, in the precisions of sampling and training; return the averages of
        reward, judge, edits alone (by the judge, or else the reward), right answers and divergence, not yet summed over
        the processes."""
        own = [self.tasks[n] for n in range(rank, len(self.tasks), processes)]
        self.shown, size = [], self.sampler.config.sampling_batch_size
        for kind in get_args(Kind):
            tasks = [task for task in own if task["kind"] == kind]
            for start in range(0, len(tasks), size):
                with sampling():
                    inputs, chosen = self.sampler.sample(tasks[start : start + size], 1, greedy=True)
                if kind in DRAWN_KINDS and self.reference is not None:
                    with training(), torch.no_grad():
                        self.averages.add("kl", self._divergence(self.sampler.rollout(kind, inputs, chosen, 1)))
                self._add(kind, tasks[start : start + size], chosen)
        return self.averages

    def _divergence(self, rollout: Rollout) -> Tensor:
        assert self.reference is not None
        logps, _ = self.sampler.log_probabilities(self.sampler.model, rollout)
        with self.reference.model() as start:
            return divergence(logps, self.sampler.log_probabilities(start, rollout)[0])

    def _add(self, kind: Kind, tasks: Sequence[Task], chosen: Tensor) -> None:
        if kind == "answering":
            right = self.rewards.answers([task["answer"] for task in tasks], self.sampler.answers(chosen))
            self.averages.add("answers", torch.tensor(right))
            return
        images = self.sampler.images(chosen)
        self.shown += images[: PANEL_IMAGES - len(self.shown)]
        parts = self.rewards.of_images(tasks, images)
        score = self.rewards.total(parts)
        self.averages.add("reward", score)
        for n, name in enumerate(self.rewards.names):
            self.averages.add(f"reward_{name}", parts[:, n])
        if self.rewards.judge is not None:
            prompts, metadata = [task["prompt"] for task in tasks], [task["metadata"] for task in tasks]
            score = torch.tensor(self.rewards.judge(prompts, metadata, images))
            self.averages.add("judge", score)
        if kind == "editing":
            self.averages.add("edits", score)

    def log_panel(self, writer: SummaryWriter, step: int) -> None:
        """Log the first images of the last evaluation."""
        if self.shown:
            side_by_side = np.concatenate([np.asarray(image) for image in self.shown], 1)
            writer.add_image("drawings", side_by_side, step, dataformats="HWC")

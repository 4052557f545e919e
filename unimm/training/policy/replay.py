"""Replay: a supervised loss beside the policy's, which keeps what no reward measures (PPO-ptx of InstructGPT,
https://arxiv.org/abs/2203.02155, equation 2)."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from unimm.config.schema import Count, Rate
from unimm.data.mixture import Mixture, MixtureConfig
from unimm.data.text.collators import FlowCollator
from unimm.errors import UserError

Batch = dict[str, dict[str, Tensor]]


@dataclass
class ReplayConfig:
    """Samples that are learned as in `t2i.py` at every step.

    Args:
        data: their flows; rows are held out as there.
        weight: factor of their loss, which is the sum of each flow's mean by its own weight.
        batch_size: samples of a micro-batch on each process.
    """

    data: MixtureConfig
    weight: Rate = 1.0
    batch_size: Count = 32


class Replay:
    """The samples of each step, a pure function of its number."""

    def __init__(self, config: ReplayConfig, processor: Any) -> None:
        self.config, self.mixture = config, Mixture(config.data)
        self.collate = FlowCollator(processor, changed_weights=config.data.changed_weights)
        self.weights = {name: config.weight * weight for name, weight in sorted(config.data.weights.items())}

    def batches(self, step: int, micro_batches: int, rank: int, world_size: int) -> list[Batch]:
        """Return the micro-batches of an optimizer step for one of `world_size` processes.

        Raises:
            UserError: if a micro-batch does not hold a sample of every flow.
        """
        size, batches = self.config.batch_size, []
        for micro in range(micro_batches):
            first = ((step * micro_batches + micro) * world_size + rank) * size
            batches.append(self.collate([self.mixture[index] for index in range(first, first + size)]))
            if missing := sorted(self.weights.keys() - batches[-1].keys()):
                raise UserError(
                    f"A batch of {size} replayed samples holds none of {missing[0]!r}: raise replay.batch_size."
                )
        return batches

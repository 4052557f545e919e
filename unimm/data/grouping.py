"""Grouping by modality and length: the samples of one optimizer step share a modality and have similar lengths.

Follows LLaVA's `group_by_modality_length` (https://github.com/haotian-liu/LLaVA, `llava/train/llava_trainer.py`): rows
with and without an image are shuffled and split into steps separately, the steps are shuffled together, and the
remainders of both form the last step. Two differences: rows are sorted by length within `POOL` steps, not within one
(LLaVA's step is as mixed in length as a random one); and rows that do not fill a step are left to the next epoch, so
that every step of an endless stream is full.
"""

import numpy as np

from unimm.data.shuffling import EpochOrder
from unimm.errors import UserError

POOL = 16
"""Number of steps whose rows are sorted together; a larger pool pads less and shuffles less."""


class GroupedOrder(EpochOrder):
    """The order of an endless stream that applies `grouped_order` in every epoch."""

    def __init__(self, modality_lengths: np.ndarray, samples_per_step: int, seed: int, salt: int = 0) -> None:
        whole = len(modality_lengths) // samples_per_step * samples_per_step
        super().__init__(whole or len(modality_lengths), seed, salt)
        self.modality_lengths, self.samples_per_step = modality_lengths, samples_per_step

    def shuffled(self, rng: np.random.Generator) -> np.ndarray:
        return grouped_order(self.modality_lengths, self.samples_per_step, rng)


def grouped_order(modality_lengths: np.ndarray, samples_per_step: int, rng: np.random.Generator) -> np.ndarray:
    """Compute the order of one epoch [n // samples_per_step * samples_per_step]; step k takes the k-th
    `samples_per_step` rows of it.

    Args:
        modality_lengths: length of each row [n]; negative for rows without an image.

    Raises:
        UserError: there are fewer rows than one step takes.
    """
    if len(modality_lengths) < samples_per_step:
        raise UserError(
            f"group_by_modality: one step takes {samples_per_step} samples and there are {len(modality_lengths)} rows: "
            "make the batch smaller."
        )
    with_images = modality_lengths > 0
    steps, left = [], []
    for rows in (np.flatnonzero(with_images), np.flatnonzero(~with_images)):
        cut, rest = _steps(rng.permutation(rows), np.abs(modality_lengths), samples_per_step)
        steps += cut
        left.append(rest)
    last = np.concatenate(left)
    order = [steps[k] for k in rng.permutation(len(steps))]
    if len(last) >= samples_per_step:  # the one mixed step
        order.append(last[:samples_per_step])
    return np.concatenate(order)


def _steps(rows: np.ndarray, lengths: np.ndarray, size: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Split rows into full steps of similar lengths, longest first within each; also return the remaining rows."""
    whole = len(rows) // size * size
    pools = [rows[start : min(start + POOL * size, whole)] for start in range(0, whole, POOL * size)]
    ordered = [pool[np.argsort(-lengths[pool], kind="stable")] for pool in pools]
    return [step for pool in ordered for step in np.split(pool, len(pool) // size)], rows[whole:]

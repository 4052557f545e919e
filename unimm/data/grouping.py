"""An order of rows in which the samples of one optimizer step are of one modality and of similar length.

As LLaVA's `group_by_modality_length` (https://github.com/haotian-liu/LLaVA, `llava/train/llava_trainer.py`): rows with
an image and rows without are shuffled and cut into steps apart, the steps are shuffled together, and what is left of
both makes the last one. Rows are sorted by length within `POOL` steps, not within one (ours: LLaVA's step
is as mixed as a random one); and what does not fill a step waits for the next pass, so that steps stay whole in an
endless stream.
"""

import numpy as np

from unimm.data.shuffling import EpochOrder
from unimm.errors import UserError

POOL = 16
"""Steps whose rows are sorted together; a larger one pads less and shuffles less."""


class GroupedOrder(EpochOrder):
    """`grouped_order` of every epoch, as an order of an endless stream."""

    def __init__(self, modality_lengths: np.ndarray, samples_per_step: int, seed: int, salt: int = 0) -> None:
        whole = len(modality_lengths) // samples_per_step * samples_per_step
        super().__init__(whole or len(modality_lengths), seed, salt)
        self.modality_lengths, self.samples_per_step = modality_lengths, samples_per_step

    def shuffled(self, rng: np.random.Generator) -> np.ndarray:
        return grouped_order(self.modality_lengths, self.samples_per_step, rng)


def grouped_order(modality_lengths: np.ndarray, samples_per_step: int, rng: np.random.Generator) -> np.ndarray:
    """Rows [n // samples_per_step * samples_per_step] in order; step k takes the k-th `samples_per_step` of them.

    Args:
        modality_lengths: length of each row [n]; below zero without an image.

    Raises:
        UserError: fewer rows than one step takes.
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
    """Whole steps of similar lengths, longest first within each, and the rows that fill none."""
    whole = len(rows) // size * size
    pools = [rows[start : min(start + POOL * size, whole)] for start in range(0, whole, POOL * size)]
    ordered = [pool[np.argsort(-lengths[pool], kind="stable")] for pool in pools]
    return [step for pool in ordered for step in np.split(pool, len(pool) // size)], rows[whole:]

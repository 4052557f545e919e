"""The choice of token ids from logits: guidance, warpers, noise and forced tokens, as one function of tensors.

It never waits for a value, so that a CUDA graph can hold it together with the forward before it. S sequences, G <= S
guided ones, R rows of logits, n tokens, K codes.
"""

from collections.abc import Hashable
from typing import TypeAlias

import torch
from torch import Tensor

from unimm.mllm.guidance import Guidance
from unimm.sampling import ImageSampling

Chosen: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""Guided logits [S, n, K], scores [S, n, K] and token ids [S, n]."""

Inputs: TypeAlias = tuple[Tensor | None, ...]


class Choice:
    """A choice of token ids; those of equal `key` compute the same from the same tensors."""

    def __init__(self, guidance: Guidance, sampling: ImageSampling, base: int) -> None:
        self.guidance, self.warpers, self.base = guidance, sampling.warpers(), base
        warped = () if sampling.greedy else (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
        rows = (guidance.scales.shape[1], guidance.sides, *guidance.rows.tolist())
        self.key: Hashable = (rows, warped, base)

    def inputs(self, start: int, stop: int, forced: Tensor, noise: Tensor | None) -> Inputs:
        """Return what a choice of the tokens start..stop-1 takes beside the logits.

        Args:
            forced: token ids [S, n] that are kept, -1 for those to choose.
            noise: [S, n, K], or None for the largest score.
        """
        return forced, noise, *self.guidance.at(start, stop)

    def __call__(
        self,
        logits: Tensor,
        forced: Tensor,
        noise: Tensor | None,
        scale: Tensor | None,
        image_scale: Tensor | None,
        on: Tensor | None,
    ) -> Chosen:
        """Return logits, scores and token ids from logits [R, n, K] and what `inputs` returned."""
        raw = self.guidance(precise(logits), scale, image_scale, on)
        scores = self.warpers(forced, raw.flatten(0, 1)).view_as(raw)  # warpers ignore the ids
        noisy = scores if noise is None else scores + noise
        return raw, scores, torch.where(forced >= 0, forced, noisy.argmax(-1) + self.base)


def precise(logits: Tensor) -> Tensor:
    """Cast logits to at least float32, the precision of guidance and noise."""
    return logits if logits.dtype == torch.float64 else logits.float()

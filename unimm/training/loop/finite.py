"""Losses that are not finite: noted on the device in every step, refused when the host looks anyway."""

import torch
from torch import Tensor

from unimm.errors import UserError


class FiniteGuard:
    """Remember the first step in which a term of the loss is not finite, without waiting for the device."""

    def __init__(self) -> None:
        self._bad_steps: dict[tuple[str, ...], Tensor] = {}

    def note(self, terms: dict[str, Tensor], step: int) -> None:
        """Note which terms, their sum "loss" among them, are not finite in `step`."""
        names, bad = tuple(terms), ~torch.isfinite(torch.stack([term.detach().float() for term in terms.values()]))
        before = self._bad_steps.get(names, torch.full(bad.shape, -1, device=bad.device))
        self._bad_steps[names] = torch.where(bad & (before < 0), step, before)

    def check(self, samples_per_step: int) -> None:
        """Raise UserError if a loss was not finite, with its first step and the images of that step."""
        first: dict[str, int] = {}
        for names, steps in self._bad_steps.items():
            for name, step in zip(names, steps.tolist(), strict=True):
                if step >= 0:
                    first.setdefault(name, step)
        if "loss" not in first:
            return
        step, size = first.pop("loss"), samples_per_step
        bad = ", ".join(name for name, since in first.items() if since == step) or "the sum"
        raise UserError(
            f"The loss is not finite at step {step} ({bad}), images {step * size} to {(step + 1) * size - 1}; lower "
            "the learning rate or look at these images. The last checkpoint is untouched."
        )

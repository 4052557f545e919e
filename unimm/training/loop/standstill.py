"""A guard against runs that train nothing: every part that learns must have moved between two lines of the log."""

from collections import defaultdict
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from unimm.errors import UserError
from unimm.training.tokenizer.parameters import part_of

STEPS = 3
"""Fewer are no proof: behind a layer that starts at zero nothing receives a gradient in the first step."""

FLOOR = 1e-4
"""A rate below this share of the group's first one counts as 0: float32 rounds such steps away."""

SMALL = 16
"""Parts of fewer weights (a scale, a bias) may rightly stay where they are."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class StandstillGuard:
    """Of the parts of `model` that `optimizer` moves; `whole` names the model in messages."""

    def __init__(self, model: nn.Module, optimizer: Any, whole: str = "") -> None:
        self.optimizer, self.whole = optimizer, whole
        names = {parameter: name for name, parameter in model.named_parameters()}
        self.groups: list[tuple[dict[str, Any], set[str]]] = []
        self.parts: dict[str, list[Tensor]] = defaultdict(list)
        for group in optimizer.param_groups:
            found = {parameter: part_of(names[parameter]) for parameter in group["params"] if parameter in names}
            for parameter, part in found.items():
                self.parts[part].append(parameter)
            self.groups.append((group, set(found.values())))
        self._before: dict[str, int] | None = None
        self._steps: dict[str, int] = dict.fromkeys(self.parts, 0)
        self._last: set[str] = set()

    def begin_step(self) -> None:
        """Call before every step of the optimizer."""
        if self._before is None:
            self._before = self._checksums()
        self._last = {
            part
            for group, parts in self.groups
            if group["lr"] > FLOOR * group.get("initial_lr", group["lr"])
            for part in parts
        }
        for part in self._last:
            self._steps[part] += 1

    def skip_step(self) -> None:
        """Take the last `begin_step` back: float16 overflowed, and the step was left out."""
        for part in self._last:
            self._steps[part] -= 1

    def check(self, step: int, resting: Collection[str] = ()) -> None:
        """Compare with the last time; call it with every line of the log. `resting` parts had no reason to move.

        Raises:
            UserError: a part did not move in at least `STEPS` steps, though its learning rate was above 0.
        """
        if self._before is None:
            return
        now = self._checksums()
        for part, value in now.items():
            if value != self._before[part] or part in resting:
                self._steps[part] = 0
            elif self._steps[part] >= STEPS and sum(parameter.numel() for parameter in self.parts[part]) >= SMALL:
                raise UserError(
                    f"{' '.join(filter(None, (self.whole, part)))} did not move in the last {self._steps[part]} steps "
                    f"up to step {step}, though its learning rate was above 0: no gradient or no update reaches it. "
                    "Look at the weights of the loss, the precision and the learning rate, or freeze it; checkpoints "
                    "written before are intact."
                )
        self._before = now

    def _checksums(self) -> dict[str, int]:
        """{part: the sum of its weights' bits} of what this process holds."""
        sums = {part: torch.stack([_bits(weight) for weight in weights]).sum() for part, weights in self.parts.items()}
        return {part: int(value) for part, value in sums.items()}


def _bits(weight: Tensor) -> Tensor:
    local = weight.to_local() if isinstance(weight, DTensor) else weight.detach()
    return local.detach().contiguous().view(-1).view(_BITS[local.element_size()]).sum(dtype=torch.int64)

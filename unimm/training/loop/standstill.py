"""Sanity check against runs that train nothing: every trainable part must have changed between two log lines."""

from collections import defaultdict
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from unimm.errors import UserError
from unimm.training.tokenizer.parameters import part_of

STEPS = 3
"""Fewer steps prove nothing: weights behind a zero-initialized layer receive no gradient in the first step."""

FLOOR = 1e-4
"""A learning rate below this share of the group's initial one counts as 0: float32 rounds such updates away."""

SMALL = 16
"""Parts with fewer weights (a scale, a bias) may legitimately stay constant."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class StandstillGuard:
    """Watch the parts of `model` that `optimizer` updates; `whole` names the model in messages."""

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
        """Count a step for each part whose learning rate is not 0; call it before every optimizer step."""
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
        """Undo the last `begin_step`: float16 gradients overflowed, and the optimizer step was skipped."""
        for part in self._last:
            self._steps[part] -= 1

    def check(self, step: int, resting: Collection[str] = ()) -> None:
        """Compare the weights with those of the last call; call it at every log line.

        `resting` parts had no reason to change.

        Raises:
            UserError: a part did not change in at least `STEPS` steps, though its learning rate was above 0.
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
        """Return {part: sum of its weights' bits as integers}, of this process's shards."""
        sums = {part: torch.stack([_bits(weight) for weight in weights]).sum() for part, weights in self.parts.items()}
        return {part: int(value) for part, value in sums.items()}


def _bits(weight: Tensor) -> Tensor:
    """Sum the bits of a weight as integers: exact in any order, and any single change shows."""
    local = weight.to_local() if isinstance(weight, DTensor) else weight.detach()
    return local.detach().contiguous().view(-1).view(_BITS[local.element_size()]).sum(dtype=torch.int64)

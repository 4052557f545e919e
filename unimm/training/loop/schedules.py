"""Learning rate schedule: linear warm-up from 0, then cosine decay to an end value.

As in VQRAE (Table 7, https://arxiv.org/abs/2511.23386), in the form of its base code, TiTok.
"""

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from unimm.errors import UserError


def warmup_cosine(step: int, total: int, warmup: int, base: float, end: float) -> float:
    """Return the learning rate at `step`: 0 at step 0, `base` at step `warmup`, `end` from step `total` on.

    Raises UserError unless 0 <= warmup <= total.
    """
    if not 0 <= warmup <= total:
        raise UserError(
            f"A warm-up of {warmup} steps does not fit into {total} steps: set train.warmup_steps to {total} or fewer."
        )
    if step < warmup:
        return base * step / warmup
    if step >= total:
        return end
    return end + (base - end) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def warmup_cosine_scheduler(
    optimizer: Optimizer,
    *,
    total: int,
    warmup: int,
    end_lr: float,
    shared_lr_multiplier: bool = False,
    begin: int = 0,
) -> LambdaLR:
    """Apply `warmup_cosine` to every parameter group, from the group's own `lr` to min(its lr, `end_lr`).

    Step it once per optimizer step. A group at or below `end_lr` (the encoder of VQRAE's stage 2) therefore stays
    constant after its warm-up. `shared_lr_multiplier` is TiTok's behavior instead: one factor for all groups, from the
    group with the largest lr, so slower groups end below `end_lr`. `begin` is the schedule's step at the first step.
    """
    warmup_cosine(0, total, warmup, 1.0, 1.0)  # raise for a bad span here, not inside the first step
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    bases = [max(rates)] * len(rates) if shared_lr_multiplier else rates

    def multiplier(base: float) -> Callable[[int], float]:
        end = min(base, end_lr)
        return lambda step: warmup_cosine(begin + step, total, warmup, base, end) / base if base > 0 else 0.0

    return LambdaLR(optimizer, [multiplier(base) for base in bases])

"""What needs the whole batch, so that P processes with k micro-batches of n samples do what one with P * k * n does.

DDP and FSDP average gradients, and accumulation sums them, which is right for a loss that is a mean over samples and
wrong for all that looks at a batch as a whole: contrastive pairs, LeCAM's squared means, the entropy of the average
code, CutMix, and random numbers. Here is what those need. The micro-batch j of process r holds the rows (j * P + r) * n
and following of the global batch. Without torch.distributed and outside `micro_batch` everything is the identity.

What other processes know is gathered. What other micro-batches know takes a first pass over them without gradients
(GradCache, https://arxiv.org/abs/2101.06983), which the trainers run only for the terms that need it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd import Function


@dataclass
class _MicroBatch:
    index: int = 0
    count: int = 1


_now = _MicroBatch()


@contextmanager
def micro_batch(index: int, count: int) -> Iterator[None]:
    """Within, the micro-batch `index` of the `count` of one optimizer step is computed."""
    before = _now.index, _now.count
    _now.index, _now.count = index, count
    try:
        yield
    finally:
        _now.index, _now.count = before


def micro_batch_index() -> int:
    """Which of the step's micro-batches is computed."""
    return _now.index


def process_count() -> int:
    """The processes of this run, 1 outside torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    return dist.get_rank() if process_count() > 1 else 0


def global_size(rows: int) -> int:
    """The samples of the global batch, of which this micro-batch holds `rows`."""
    return rows * process_count() * _now.count


class _Gathered(Function):
    @staticmethod
    def forward(ctx: object, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(process_count())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(process_count())[process_index()]


def all_rows(rows: Tensor) -> Tensor:
    """The rows [n, ...] of every process in this micro-batch, [P * n, ...], differentiable; n is the same
    everywhere."""
    return _Gathered.apply(rows) if process_count() > 1 else rows


def own_rows(rows: Tensor) -> Tensor:
    """This micro-batch's part of something [P * k * n, ...] that all processes and micro-batches hold alike."""
    parts = process_count() * _now.count
    return rows.chunk(parts)[_now.index * process_count() + process_index()]


def rows_before(window: Sequence[Tensor]) -> Tensor:
    """For each row [n, ...] of this micro-batch the one before it in the global batch, whose first follows its last;
    no gradient goes through. `window` holds this process's rows of every micro-batch."""
    ends = torch.cat([all_rows(rows[-1:].detach()) for rows in window])
    own = window[_now.index].detach()
    before = (_now.index * process_count() + process_index() - 1) % len(ends)
    return torch.cat([ends[before : before + 1], own[:-1]])


def as_mean(value: Tensor, mean: Tensor) -> Tensor:
    """`mean`, of which `value` is this micro-batch's part. Its gradient flows into `value` as if that were the mean,
    which is right once the gradients of all parts have been averaged."""
    return value + (mean - value).detach()


def mean_over_processes(value: Tensor) -> Tensor:
    """The mean of the processes' values, with the gradient of `as_mean`."""
    if process_count() == 1:
        return value
    mean = value.detach().clone()
    dist.all_reduce(mean)
    return as_mean(value, mean / process_count())


def as_summand(value: Tensor) -> Tensor:
    """`value`, whose gradient is not averaged over the micro-batches but summed: for a part of something that every
    micro-batch computes whole."""
    return value + (_now.count - 1) * (value - value.detach())

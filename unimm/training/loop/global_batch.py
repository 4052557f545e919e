"""Global-batch operations: P processes with k micro-batches of n samples compute what one with P * k * n samples does.

DDP and FSDP average gradients, and accumulation sums them, which is correct for a loss that is a mean over samples but
not for operations on a whole batch: contrastive pairs, LeCAM's squared means, the entropy of the average code, CutMix,
and random numbers. This module has the operations for those. Micro-batch j of process r holds the n rows of the global
batch from (j * P + r) * n on. Without torch.distributed and outside `micro_batch` everything is the identity.

Rows of other processes are gathered. Those of other micro-batches need a first pass over them without gradients
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
    """Mark the context as computing micro-batch `index` of the `count` of one optimizer step."""
    before = _now.index, _now.count
    _now.index, _now.count = index, count
    try:
        yield
    finally:
        _now.index, _now.count = before


def micro_batch_index() -> int:
    """Return the index of the current micro-batch in its optimizer step."""
    return _now.index


def process_count() -> int:
    """Return the number of processes, 1 outside torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    """Return the rank of this process, 0 outside torch.distributed."""
    return dist.get_rank() if process_count() > 1 else 0


def global_size(rows: int) -> int:
    """Return the number of samples of the global batch, of which this micro-batch holds `rows`."""
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
        dist.all_reduce(gradient)  # the loss of every process depends on these rows
        return gradient.chunk(process_count())[process_index()]


def all_rows(rows: Tensor) -> Tensor:
    """Gather the rows [n, ...] of this micro-batch from every process to [P * n, ...], differentiably; n is the same
    on every process."""
    return _Gathered.apply(rows) if process_count() > 1 else rows


def own_rows(rows: Tensor) -> Tensor:
    """Return this micro-batch's rows [n, ...] of a tensor [P * k * n, ...] that is the same on all processes and
    micro-batches."""
    parts = process_count() * _now.count
    return rows.chunk(parts)[_now.index * process_count() + process_index()]


def rows_before(window: Sequence[Tensor]) -> Tensor:
    """Return, for each row [n, ...] of this micro-batch, the previous row of the global batch (cyclic), without
    gradient. `window` holds this process's rows of every micro-batch."""
    ends = torch.cat([all_rows(rows[-1:].detach()) for rows in window])
    own = window[_now.index].detach()
    before = (_now.index * process_count() + process_index() - 1) % len(ends)
    return torch.cat([ends[before : before + 1], own[:-1]])


def as_mean(value: Tensor, mean: Tensor) -> Tensor:
    """Return `mean`, the average of all micro-batches' `value`, with its gradient passed to `value` as if that were the
    mean; this is correct once the gradients of all micro-batches have been averaged."""
    return value + (mean - value).detach()


def mean_over_processes(value: Tensor) -> Tensor:
    """Return the mean of the processes' values, with the gradient of `as_mean`."""
    if process_count() == 1:
        return value
    mean = value.detach().clone()
    dist.all_reduce(mean)
    return as_mean(value, mean / process_count())


def as_summand(value: Tensor) -> Tensor:
    """Return `value` with a gradient that is summed over the micro-batches instead of averaged: for a part of a whole
    that every micro-batch computes in full."""
    return value + (_now.count - 1) * (value - value.detach())

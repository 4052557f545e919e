"""What needs the batch of all processes, so that P of them with n samples each do what one with P * n does.

DDP and FSDP average gradients, which is right for a loss that is a mean over samples and wrong for all that looks at a
batch as a whole: contrastive pairs, LeCAM's squared means, the entropy of the average code. Here is what those need.
Process r holds the rows r * n to (r + 1) * n of the global batch, and all processes draw from one seed. Without
torch.distributed everything is the identity.
"""

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd import Function


def process_count() -> int:
    """The processes of this run, 1 outside torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    return dist.get_rank() if process_count() > 1 else 0


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
        return own_rows(gradient)


def all_rows(rows: Tensor) -> Tensor:
    """The rows [n, ...] of every process as the global batch [P * n, ...], differentiable; n is the same everywhere."""
    return _Gathered.apply(rows) if process_count() > 1 else rows


def own_rows(rows: Tensor) -> Tensor:
    """This process' part of something [P * n, ...] that all processes hold alike."""
    return rows.chunk(process_count())[process_index()]


def rows_before(rows: Tensor) -> Tensor:
    """For each of this process' rows [n, ...] the one before it in the global batch, whose first follows its last; no
    gradient goes through."""
    return own_rows(all_rows(rows.detach()).roll(1, dims=0))


def mean_over_processes(value: Tensor) -> Tensor:
    """The mean of the processes' values. Its gradient flows into the own one as if that were the mean, which is right
    once DDP has averaged the gradients."""
    if process_count() == 1:
        return value
    mean = value.detach().clone()
    dist.all_reduce(mean)
    return value + (mean / process_count() - value.detach())

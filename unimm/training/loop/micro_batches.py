"""Gradient accumulation for several modules with their own optimizers.

The caller passes the index of the micro-batch. accelerate's own `accumulate` counts its calls instead: two modules that
each call it in a micro-batch shift each other's window, and with an even number of micro-batches no step is ever taken.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from accelerate import Accelerator
from torch import nn

from unimm.training.loop.global_batch import micro_batch


@contextmanager
def accumulating(index: int, count: int, accelerator: Accelerator, module: nn.Module) -> Iterator[None]:
    """Run forward and backward of micro-batch `index` of `count` inside the context; DDP reduces the gradients of
    `module` at the last one only. Divide the loss by `count`, and step the optimizer after the last."""
    waits = accelerator.no_sync(module) if index < count - 1 else nullcontext()
    with micro_batch(index, count), waits:
        yield

"""One optimizer step of several micro-batches, without a counter: who loops says which is the last.

accelerate's own `accumulate` counts its calls. Two modules that each call it within a micro-batch move each other's
window, and with an even number of micro-batches nothing is ever stepped.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from accelerate import Accelerator
from torch import nn

from unimm.training.loop.global_batch import micro_batch


@contextmanager
def accumulating(index: int, count: int, accelerator: Accelerator, module: nn.Module) -> Iterator[None]:
    """Within, the micro-batch `index` of `count` is computed, forward and backward; DDP adds up the gradients of
    `module` at the last one alone. Divide the loss by `count`, and step the optimizer after the last."""
    waits = accelerator.no_sync(module) if index < count - 1 else nullcontext()
    with micro_batch(index, count), waits:
        yield

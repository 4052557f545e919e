"""Modules that stay in float32 when the model around them is cast."""

from collections.abc import Callable
from typing import Self

from torch import Tensor, nn


class Float32Module(nn.Module):
    """A module that stays in float32: `model.to(torch.bfloat16)` or `.half()` may move its tensors, but not cast them.

    The codebook and the projections need it: in bfloat16 about one id in a hundred changes.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype != tensor.dtype else moved

        return super()._apply(keep_dtype, recurse)

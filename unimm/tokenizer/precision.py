"""Modules that stay in float32 when the model around them is cast."""

from collections.abc import Callable
from typing import Self

from torch import Tensor, nn


class Float32Module(nn.Module):
    """`model.to(torch.bfloat16)` and `model.half()` move its tensors to the device and leave their dtype alone.

    Codebook and projections need it: in bfloat16 about one id in a hundred is another one.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype != tensor.dtype else moved

        return super()._apply(keep_dtype, recurse)

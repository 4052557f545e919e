"""The LARS optimizer: SGD with momentum whose step is scaled per layer by the norm of the weights (arXiv 1708.03888).

For a matrix w with gradient g:  d = g + weight_decay w,  d <- trust |w| / |d| d  (unless a norm is 0),
m <- momentum m + d,  w <- w - lr m. Vectors (biases) take d = g. This is the variant of MAE's linear probe (arXiv
2111.06377, appendix A.2).
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class LARS(torch.optim.Optimizer):
    """The LARS optimizer; see the module docstring for the update rule."""

    def __init__(
        self,
        params: Iterable[Tensor],
        *,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.001,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one optimization step; `closure` as in torch."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                update = parameter.grad
                if parameter.ndim > 1:
                    update = update + group["weight_decay"] * parameter
                    sizes = parameter.norm(), update.norm()
                    ratio = group["trust"] * sizes[0] / sizes[1]
                    update = update * torch.where((sizes[0] > 0) & (sizes[1] > 0), ratio, 1.0)
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].mul_(group["momentum"]).add_(update)
                parameter.sub_(group["lr"] * state["momentum"])
        return loss

"""Muon for the matrices of a language model's blocks and AdamW for everything else, in one torch optimizer.

Muon (https://kellerjordan.github.io/posts/muon/) orthogonalizes each matrix's momentum before it is applied. The
update is scaled to the root mean square of AdamW's (https://arxiv.org/abs/2502.16982, section 2.2), so that both share
one learning rate.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from unimm.bfloat16 import automatic_dtype

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the Newton-Schulz polynomial, Muon's own
ADAMW_RMS = 0.2


def orthogonalized(matrices: Tensor, steps: int = 5) -> Tensor:
    """Return matrices [n, R, C] with all singular values brought near 1, by Newton-Schulz iteration, in bfloat16 if it
    is fast on the device."""
    a, b, c = COEFFICIENTS
    x = matrices.to(automatic_dtype(matrices.device))
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class MuonAdamW(torch.optim.AdamW):
    """AdamW whose parameter groups with `muon=True` (matrices only) are updated by Muon.

    Args:
        params: parameter groups.
        momentum: Muon's momentum, with Nesterov's look-ahead.
        kwargs: arguments of torch.optim.AdamW.
    """

    param_groups: list[dict[str, Any]]

    def __init__(self, params: Iterable[dict[str, Any]], *, momentum: float = 0.95, **kwargs: Any) -> None:
        groups = [{"muon": False, "momentum": momentum, **group} for group in params]
        for group in groups:
            group["params"] = list(group["params"])
            if group["muon"] and any(parameter.ndim != 2 for parameter in group["params"]):
                raise ValueError("Muon moves matrices only; put vectors and embeddings into a group without it")
        super().__init__(groups, **kwargs)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Run one step of both optimizers; `closure` as in torch."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        for group in groups:
            if group["muon"]:
                self._muon_step(group)
        # AdamW's step covers all of `param_groups`: hide Muon's from it.
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            super().step()
        finally:
            self.param_groups = groups
        return loss

    def _muon_step(self, group: dict[str, Any]) -> None:
        by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is not None:
                by_shape[parameter.shape].append(parameter)
        for shape, parameters in by_shape.items():  # one batch of matrices instead of many small products
            momenta = [self._momentum_of(p) for p in parameters]
            gradients = [p.grad for p in parameters]
            torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
            ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])
            updates = orthogonalized(torch.stack(ahead))
            scale = group["lr"] * ADAMW_RMS * max(shape) ** 0.5  # an orthogonal [R, C] has RMS 1 / sqrt(max(R, C))
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(parameters, list(updates.unbind()), alpha=-scale)

    def _momentum_of(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)  # AdamW expects it when a state is loaded
            state["momentum_buffer"] = torch.zeros_like(parameter)
        state["step"] += 1
        return state["momentum_buffer"]


def muon_groups(blocks: Iterable[nn.Module], others: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Split AdamW's parameter groups `others`: the matrices of `blocks` go into groups for Muon."""
    matrices = {p for block in blocks for p in block.parameters() if p.ndim == 2 and p.requires_grad}
    groups = []
    for group in others:
        members = list(group["params"])
        parts = {flag: [p for p in members if (p in matrices) == flag] for flag in (True, False)}
        groups += [{**group, "params": part, "muon": flag} for flag, part in parts.items() if part]
    return groups

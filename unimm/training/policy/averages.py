"""Running means of named quantities over many steps and all processes."""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor


class Averages:
    """Means of `names`, kept on the device as sums and counts so that nothing waits for it; the names are the same on
    every process."""

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self.names = {name: n for n, name in enumerate(names)}
        self.sums = torch.zeros(len(names), 2, device=device)

    def add(self, name: str, values: Tensor) -> None:
        """Add the values."""
        total = values.detach().float().sum().to(self.sums.device)
        self.sums[self.names[name]] += torch.stack([total, total.new_tensor(values.numel())])

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the means of what was added on any process since the last call; call it on every process."""
        sums = accelerator.reduce(self.sums.clone(), "sum").tolist()
        self.sums.zero_()
        return {name: sums[n][0] / sums[n][1] for name, n in self.names.items() if sums[n][1]}

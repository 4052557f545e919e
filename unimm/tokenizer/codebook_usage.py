"""Codebook usage statistics of a set of images, from streaming counts.

Usage is underestimated on few ids: T uniformly drawn ids contain only about K (1 - exp(-T / K)) of K codes, so count at
least 5 K ids.
"""

from typing import Self

import torch
from torch import Tensor


class CodebookUsage:
    """A counter of ids; its statistics cover all ids counted so far.

    Args:
        codebook_size: K, the number of codes.
        device: of the counts; that of the ids, if `count` is used.
    """

    def __init__(self, codebook_size: int, device: torch.device | str = "cpu") -> None:
        self.counts = torch.zeros(codebook_size, dtype=torch.int64, device=device)  # [K]

    def update(self, ids: Tensor) -> None:
        """Count ids of any shape. Raises ValueError for an id outside 0..K-1."""
        flat = ids.detach().flatten().cpu()
        size = len(self.counts)
        if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < size:
            raise ValueError(f"ids run from {int(flat.min())} to {int(flat.max())}, the codebook from 0 to {size - 1}")
        self.counts += torch.bincount(flat, minlength=size).to(self.counts.device)

    def count(self, ids: Tensor) -> None:
        """Count ids of any shape that a quantizer has just chosen, on their own device: no range check, no wait."""
        flat = ids.detach().flatten()
        self.counts.scatter_add_(0, flat, torch.ones_like(flat))

    def merge(self, other: Self) -> None:
        """Add the counts of another part of the data. Raises ValueError for another codebook size."""
        if len(other.counts) != len(self.counts):
            raise ValueError(f"counts of {len(other.counts)} codes cannot join counts of {len(self.counts)}")
        self.counts += other.counts

    @property
    def dead(self) -> int:
        """Return the number of codes that never occurred."""
        return int((self.counts == 0).sum())

    @property
    def use(self) -> float:
        """Return the share of the codes that occurred at least once."""
        return 1 - self.dead / len(self.counts)

    @property
    def entropy(self) -> float:
        """Compute the entropy of the empirical id distribution in bits, at most log2 K; 0 if nothing was counted."""
        shares = self.counts.double() / self.counts.sum().clamp(min=1)
        return float(torch.special.entr(shares).sum() / torch.log(torch.tensor(2.0, dtype=torch.float64)))

    @property
    def perplexity(self) -> float:
        """Return 2^entropy, the number of equally frequent codes with the same entropy."""
        return float(2.0**self.entropy)

"""How much of a codebook a set of images uses, from streaming counts.

A small set flatters nobody: T ids drawn uniformly touch only K (1 - exp(-T / K)) of K codes, so count at least 5 K of
them.
"""

from typing import Self

import torch
from torch import Tensor


class CodebookUsage:
    """Counts ids batch by batch; the statistics are those of everything counted so far.

    Args:
        codebook_size: K, the number of codes.
    """

    def __init__(self, codebook_size: int) -> None:
        self.counts = torch.zeros(codebook_size, dtype=torch.int64)  # [K]

    def update(self, ids: Tensor) -> None:
        """Count ids of any shape. Raises ValueError for an id outside 0..K-1."""
        flat = ids.detach().flatten().cpu()
        size = len(self.counts)
        if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < size:
            raise ValueError(f"ids run from {int(flat.min())} to {int(flat.max())}, the codebook from 0 to {size - 1}")
        self.counts += torch.bincount(flat, minlength=size)

    def merge(self, other: Self) -> None:
        """Add the counts of another part of the data. Raises ValueError for another codebook size."""
        if len(other.counts) != len(self.counts):
            raise ValueError(f"counts of {len(other.counts)} codes cannot join counts of {len(self.counts)}")
        self.counts += other.counts

    @property
    def dead(self) -> int:
        """Codes that never occurred."""
        return int((self.counts == 0).sum())

    @property
    def use(self) -> float:
        """Share of the codes that occurred at least once."""
        return 1 - self.dead / len(self.counts)

    @property
    def entropy(self) -> float:
        """Entropy of the empirical distribution of ids, in bits; log2 K at most. 0 when nothing was counted."""
        shares = self.counts.double() / self.counts.sum().clamp(min=1)
        return float(torch.special.entr(shares).sum() / torch.log(torch.tensor(2.0, dtype=torch.float64)))

    @property
    def perplexity(self) -> float:
        """2 to the entropy: as many equally frequent codes would be as uncertain."""
        return float(2.0**self.entropy)

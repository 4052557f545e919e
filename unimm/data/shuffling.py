"""Shuffled orders of an endless stream over finite data: item n is a pure function of (seed, n).

Data stored in blocks (shards, row groups) is shuffled by block and, within a pool of a few blocks, by row, which keeps
reads local. Item n is computed directly, without iterating over the items before it.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from torch.utils.data import Dataset

from unimm.errors import UserError

_CYCLE = 1000  # length of the interleaving cycle: shares are exact to 1/1000


class Rows(Dataset):
    """Base class of map-style data sets with random access to their rows.

    Attributes:
        blocks: number of rows of each storage block, in order; None if any row is equally fast to read.
        pool: number of blocks that are shuffled together.
        caption_gap: why no row has a caption; None if some have one.
        column_names: columns of a table, else empty.
    """

    blocks: np.ndarray | None = None
    pool: int = 1
    caption_gap: str | None = None
    column_names: Sequence[str] = ()

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> dict[str, Any]:
        raise NotImplementedError

    def number(self, index: int) -> int:
        """Return the number of row `index` in its source; it differs from `index` if these are a subset of its rows."""
        return index

    @property
    def total(self) -> int:
        """Return the number of rows of the source."""
        return len(self)


class Placed(Protocol):
    """Anything with a length and a block layout (`Rows`)."""

    @property
    def blocks(self) -> np.ndarray | None: ...

    @property
    def pool(self) -> int: ...

    def __len__(self) -> int: ...


class Order(Protocol):
    """Maps item n to a row; `count` items are one epoch."""

    count: int

    def row(self, index: int) -> int: ...


def order_of(rows: Placed, seed: int, salt: int = 0) -> Order:
    """Return the order in which a stream repeats `rows`, epoch after epoch."""
    if rows.blocks is None:
        return EpochOrder(len(rows), seed, salt)
    return BlockOrder(rows.blocks, rows.pool, seed, salt)


class EpochOrder:
    """A full shuffle: item n of the stream is `row(n)`, and each epoch visits all `count` rows in a new order, a pure
    function of (seed, salt, epoch)."""

    def __init__(self, count: int, seed: int, salt: int = 0) -> None:
        self.count, self.seed, self.salt = count, seed, salt
        self._order: tuple[int, np.ndarray] | None = None

    def row(self, index: int) -> int:
        epoch, position = divmod(index, self.count)
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, self.shuffled(np.random.default_rng((self.seed, self.salt, epoch))))
        return int(self._order[1][position])

    def shuffled(self, rng: np.random.Generator) -> np.ndarray:
        """Return the shuffled rows of one epoch [count]."""
        return rng.permutation(self.count)


class BlockOrder:
    """A local shuffle: each epoch shuffles the blocks, groups them into pools of `pool` blocks, and shuffles the rows
    within each pool. Memory is that of one pool's row numbers."""

    def __init__(self, blocks: np.ndarray, pool: int, seed: int, salt: int = 0) -> None:
        self.blocks, self.pool, self.key = blocks, pool, (seed, salt)
        self.starts = np.concatenate([[0], np.cumsum(blocks)])
        self.count = int(self.starts[-1])
        self._epoch: tuple[int, list[np.ndarray], np.ndarray] | None = None
        self._rows: tuple[tuple[int, int], np.ndarray] | None = None

    def row(self, index: int) -> int:
        epoch, position = divmod(index, self.count)
        pools, ends = self._pools(epoch)
        k = int(np.searchsorted(ends, position, side="right"))
        if self._rows is None or self._rows[0] != (epoch, k):
            rows = np.concatenate([np.arange(self.starts[b], self.starts[b + 1]) for b in pools[k]])
            self._rows = (epoch, k), np.random.default_rng((*self.key, epoch, 1 + k)).permutation(rows)
        return int(self._rows[1][position - (ends[k - 1] if k else 0)])

    def _pools(self, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
        """Return the blocks of each pool, and the position after each pool's last row."""
        if self._epoch is None or self._epoch[0] != epoch:
            order = np.random.default_rng((*self.key, epoch)).permutation(len(self.blocks))
            pools = [order[start : start + self.pool] for start in range(0, len(order), self.pool)]
            self._epoch = epoch, pools, np.cumsum([self.blocks[pool].sum() for pool in pools])
        return self._epoch[1], self._epoch[2]


class Interleaving:
    """Mixes several endless streams so that each keeps its share in every stretch: the next item comes from the stream
    that is furthest below its share."""

    def __init__(self, ratios: Sequence[float]) -> None:
        self.order = interleave(ratios)
        self.earlier = np.stack([np.cumsum(self.order == k) - (self.order == k) for k in range(len(ratios))])

    def place(self, index: int) -> tuple[int, int]:
        """Return (stream, rank within the stream) of item `index`."""
        cycle, position = divmod(index, _CYCLE)
        k = int(self.order[position])
        return k, cycle * int((self.order == k).sum()) + int(self.earlier[k, position])


def interleave(ratios: Sequence[float]) -> np.ndarray:
    """Compute the stream of each of 1000 positions [1000]: always the one that is furthest below its share."""
    shares = np.asarray(ratios, dtype=np.float64) / sum(ratios)
    given = np.zeros(len(shares))
    order = np.empty(_CYCLE, dtype=np.int64)
    for position in range(_CYCLE):
        order[position] = np.argmax(shares * (position + 1) - given)
        given[order[position]] += 1
    if not given.all():
        raise UserError(f"A flow has a share below 1/{_CYCLE} of the samples: the ratios are {list(ratios)}.")
    return order


class OwnBatches(Sequence[int]):
    """The sample numbers of one process, from `start` on: it takes the `index`-th of every `count` batches of `size`
    samples, so that the batches of all processes, in turn, are the stream."""

    def __init__(self, start: int, stop: int, *, size: int, index: int = 0, count: int = 1) -> None:
        self.start, self.size, self.own, self.every = start, size, index, count  # a Sequence has methods index, count
        self.length = (stop - start) // (size * count) * size

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, position: int) -> int:  # type: ignore[override]
        if not 0 <= position < self.length:
            raise IndexError(position)
        batch, row = divmod(position, self.size)
        return self.start + (batch * self.every + self.own) * self.size + row

"""The order of an endless stream over a finite set."""

import numpy as np


class EpochOrder:
    """Item n of the stream is `row(n)`: each epoch visits all `count` rows in a new order, a function of (seed, epoch)
    only."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self._order: tuple[int, np.ndarray] | None = None

    def row(self, index: int) -> int:
        epoch, position = divmod(index, self.count)
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng((self.seed, 0, epoch)).permutation(self.count))
        return int(self._order[1][position])

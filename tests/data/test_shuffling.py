"""Orders of endless streams: every row once an epoch, item n from n alone, and blocks that stay together."""

import numpy as np
import pytest

from unimm.data.shuffling import BlockOrder, EpochOrder, Interleaving

BLOCKS = np.array([5, 1, 8, 3, 4, 6, 2])


@pytest.mark.parametrize("order", [lambda: EpochOrder(29, 3), lambda: BlockOrder(BLOCKS, 3, 3)], ids=["rows", "blocks"])
def test_every_row_comes_once_an_epoch_and_item_n_is_always_the_same(order):
    rows = [order().row(n) for n in (80, 2, 40)]
    one = order()
    everything = [one.row(n) for n in range(87)]
    assert all(sorted(everything[start : start + 29]) == list(range(29)) for start in (0, 29, 58))
    assert everything[:29] != everything[29:58]
    assert [everything[n] for n in (80, 2, 40)] == rows


def test_a_reader_of_blocks_needs_no_more_than_a_pool_at_a_time():
    starts = np.concatenate([[0], np.cumsum(BLOCKS)])
    order = BlockOrder(BLOCKS, 3, seed=1)
    blocks = [int(np.searchsorted(starts, order.row(n), side="right")) - 1 for n in range(29)]
    met: list[int] = list(dict.fromkeys(blocks))
    pools = [met[:3], met[3:6], met[6:]]
    assert blocks != sorted(blocks, key=met.index)  # the rows of a pool are mixed
    end = 0
    for pool in pools:
        start, end = end, end + int(BLOCKS[pool].sum())
        assert set(blocks[start:end]) == set(pool)


def test_streams_are_interleaved_by_their_shares():
    mixed = Interleaving([3, 1])
    places = [mixed.place(n) for n in range(4000)]
    for k, count in ((0, 3000), (1, 1000)):
        assert [rank for stream, rank in places if stream == k] == list(range(count))

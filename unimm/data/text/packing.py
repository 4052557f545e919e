"""Sequence packing: several samples share one row, without attending to each other.

There is no attention mask. Positions restart at every sample, and transformers builds the block-diagonal causal mask
from them if no cache is used (`use_cache=False`), so samples do not affect each other, bit for bit. The first token of
a sample is never a label: it would be predicted from another sample. N samples, R rows, P tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

IGNORED = -100
"""Label of a token without a loss."""


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Assign samples to rows by first-fit decreasing: the longest first, each into the first row with room for it.
    Reordering the batch does not change its mean loss."""
    rows: list[list[int]] = []
    room: list[int] = []
    for sample in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        fitting = next((k for k, free in enumerate(room) if free >= lengths[sample]), None)
        if fitting is None:
            rows.append([])
            room.append(capacity)
            fitting = len(rows) - 1
        rows[fitting].append(sample)
        room[fitting] -= lengths[sample]
    return rows


def even_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Assign samples to as many rows as `first_fit` needs, filled evenly. A batch is as wide as its fullest row, so
    each sample, the longest first, goes into the emptiest row (Graham 1969); `first_fit`'s rows are kept if that is
    worse."""
    rows = first_fit(lengths, capacity)
    dealt: list[list[int]] = [[] for _ in rows]
    filled = [0] * len(rows)
    for sample in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        emptiest = filled.index(min(filled))
        dealt[emptiest].append(sample)
        filled[emptiest] += lengths[sample]
    fullest = max(sum(lengths[sample] for sample in row) for row in rows)
    return dealt if max(filled) <= fullest else rows


def pack(batch: dict[str, Tensor], rows: Sequence[Sequence[int]], pad: int) -> dict[str, Tensor]:
    """Pack a batch of right-padded samples [N, L] into rows [R, P], with P the tokens of the fullest row.

    Args:
        batch: `input_ids`, `attention_mask`, `labels` and `drawn` [N, L]; `drawn_pixel_values` [N, 3, H, W] or
            `drawn_ids` [N, M] or neither.
        rows: the samples of each row (`even_rows`).
        pad: padding token id; the padding of a row is a sequence of its own, without labels.

    Returns:
        `input_ids`, `position_ids`, `labels` and `drawn` [R, P], and the drawings in the order of the rows.
    """
    lengths = batch["attention_mask"].sum(1).tolist()
    width = max(sum(lengths[sample] for sample in row) for row in rows)
    shape = (len(rows), width)
    packed = {
        "input_ids": torch.full(shape, pad, dtype=batch["input_ids"].dtype),
        "labels": torch.full(shape, IGNORED, dtype=batch["labels"].dtype),
        "drawn": torch.zeros(shape, dtype=torch.bool),
        "position_ids": torch.zeros(shape, dtype=torch.int64),
    }
    for k, row in enumerate(rows):
        start = 0
        for sample in row:
            end = start + lengths[sample]
            for name in ("input_ids", "labels", "drawn"):
                packed[name][k, start:end] = batch[name][sample, : lengths[sample]]
            packed["labels"][k, start] = IGNORED  # it would be predicted from the previous sample
            packed["position_ids"][k, start:end] = torch.arange(lengths[sample])
            start = end
        packed["position_ids"][k, start:] = torch.arange(width - start)  # padding is a sequence of its own
    order = torch.tensor([sample for row in rows for sample in row])
    return packed | {name: batch[name][order] for name in ("drawn_pixel_values", "drawn_ids") if name in batch}

"""The train/test split of external data: which rows of a source are held out for evaluation.

The split is a fixed function of the row number: of every stretch of `1 / share` rows one is held out, at an offset
given by a hash. The two parts are therefore disjoint for any seed, shuffling, mixture, and number of workers and
processes, and the same in every run. Row n of either part is computed in closed form.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unimm.data.shapes.prompts import Split
from unimm.data.shuffling import Rows
from unimm.data.sources.storage import filled, is_pattern, is_url, listed
from unimm.errors import UserError

DEFAULT_SHARE = 0.01


def check_share(share: float) -> None:
    """Raise UserError if `share` is not in [0, 0.5]."""
    if not 0 <= share <= 0.5:
        raise UserError(f"data.eval_share lies between 0 (nothing is held out) and 0.5, and is {share}.")


class HeldOut:
    """The split of a source of `rows` rows: at least one row is held out of two or more, none of a single row.

    Args:
        share: share of the rows to hold out; 0 holds out none.
    """

    def __init__(self, rows: int, share: float = DEFAULT_SHARE) -> None:
        check_share(share)
        self.rows = rows
        self.period = min(rows, round(1 / share)) if share else 0
        if self.period < 2:
            self.period = 0

    def before(self, row: int) -> int:
        """Count the held-out rows among the rows 0 to `row`, exclusive."""
        if not self.period:
            return 0
        stretches, rest = divmod(row, self.period)
        return stretches + (self._place(stretches) < rest)

    def count(self, split: Split) -> int:
        """Return the number of rows of one part."""
        held_out = self.before(self.rows)
        return held_out if split == "test" else self.rows - held_out

    def row(self, index: int, split: Split) -> int:
        """Return the source row number of row `index` of one part."""
        if not 0 <= index < self.count(split):
            raise IndexError(index)
        if split == "test":
            return index * self.period + self._place(index)
        if not self.period:
            return index
        stretch, offset = divmod(index, self.period - 1)
        return stretch * self.period + offset + (offset >= self._place(stretch))

    def numbers(self, split: Split) -> np.ndarray:
        """Return the source row numbers of one part [n]."""
        held_out = np.array([self.row(n, "test") for n in range(self.count("test"))], dtype=np.int64)
        return held_out if split == "test" else np.setdiff1d(np.arange(self.rows), held_out)

    def _place(self, stretch: int) -> int:
        # A hash instead of a fixed offset, so that data with a periodic layout is held out without bias.
        digest = hashlib.blake2b(stretch.to_bytes(8, "little"), digest_size=8).digest()
        return int.from_bytes(digest, "little") % self.period


class PartOfRows(Rows):
    """One part of `rows`: the training rows, or the held-out rows.

    Raises:
        UserError: nothing can be held out.
    """

    def __init__(self, rows: Rows, share: float, split: Split, source: str) -> None:
        self.rows, self.rule, self.split = rows, HeldOut(len(rows), share), split
        require_held_out(self.rule, split, source)
        self.pool, self.caption_gap, self.column_names = rows.pool, rows.caption_gap, rows.column_names
        if rows.blocks is not None:
            held_out = np.array([self.rule.before(int(end)) for end in np.cumsum([0, *rows.blocks])])
            self.blocks = np.diff(held_out) if split == "test" else rows.blocks - np.diff(held_out)

    def __len__(self) -> int:
        return self.rule.count(self.split)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[self.number(index)]

    def number(self, index: int) -> int:
        return self.rule.row(index, self.split)

    @property
    def total(self) -> int:
        return len(self.rows)


def require_held_out(rule: HeldOut, split: Split, source: str) -> None:
    """Raise UserError if `split` is "test" and no row is held out."""
    if split == "test" and not rule.count("test"):
        why = f"holds {rule.rows} row" if rule.rows < 2 else "has eval_share 0"
        raise UserError(
            f"{source} {why}, so none of its rows is held out to evaluate on: give an eval_source, or evaluate nothing "
            "(data.num_eval_samples: 0)."
        )


# ---- several sources of one run ----


def refuse_overlaps(trained: Sequence[tuple[str, bool]], evaluated: Sequence[str]) -> None:
    """Raise UserError if a flow would train on rows that another flow is evaluated on.

    Args:
        trained: (source of training rows, whether a share of it is held out).
        evaluated: evaluation-only sources.
    """
    places = [(source, reserved, _places(source)) for source, reserved in trained]
    for source in evaluated:
        for other, _, there in places:
            if _overlap(_places(source), there):
                raise UserError(
                    f"The eval_source {source} is trained on too, as {other}: give other data, or leave eval_source "
                    "out, which holds out a share of the rows."
                )
    for n, (source, reserved, here) in enumerate(places):
        for other, reserved_too, there in places[:n]:
            same = here == there
            if (reserved or reserved_too) and not (same and reserved == reserved_too) and _overlap(here, there):
                raise UserError(
                    f"{other} and {source} hold the same rows, of which one would train on what the other holds out: "
                    "name the source alike in both, and give an eval_source to both or to none."
                )


def _places(source: str) -> frozenset[str]:
    """Return the files or the folder that a source names."""
    place = filled(source)
    if is_url(place) or place.startswith("hub:"):
        return frozenset(listed(place) if is_pattern(place) else [place])
    found = listed(place) if is_pattern(place) else [place]
    return frozenset(str(Path(each).resolve()) for each in found)


def _overlap(here: frozenset[str], there: frozenset[str]) -> bool:
    """Return whether a file or folder of one is inside the other."""
    return any(_within(each, there) for each in here) or any(_within(each, here) for each in there)


def _within(place: str, others: frozenset[str]) -> bool:
    return place in others or any(str(parent) in others for parent in Path(place).parents)

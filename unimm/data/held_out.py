"""Which rows of a source are held out for evaluation, and which are trained on.

A fixed rule of the row's number alone: one row of every `1 / share`, at a place within each such stretch that a hash
decides. So the two parts are disjoint whatever the seed, the shuffling, the mixture, the number of workers and
processes, and in every run on the source; and row n of either part is computed, however many rows there are.
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
    """Raise UserError for a share that leaves less to train on than to evaluate on."""
    if not 0 <= share <= 0.5:
        raise UserError(f"data.eval_share lies between 0 (nothing is held out) and 0.5, and is {share}.")


class HeldOut:
    """The rule for a source of `rows` rows: at least one is held out of two or more, none of a single one.

    Args:
        share: of the rows, 0 holds out none.
    """

    def __init__(self, rows: int, share: float = DEFAULT_SHARE) -> None:
        check_share(share)
        self.rows = rows
        self.period = min(rows, round(1 / share)) if share else 0
        if self.period < 2:
            self.period = 0

    def before(self, row: int) -> int:
        """How many of the rows 0 to `row`, exclusive, are held out."""
        if not self.period:
            return 0
        stretches, rest = divmod(row, self.period)
        return stretches + (self._place(stretches) < rest)

    def count(self, split: Split) -> int:
        """Rows of one part."""
        held_out = self.before(self.rows)
        return held_out if split == "test" else self.rows - held_out

    def row(self, index: int, split: Split) -> int:
        """The source's number of row `index` of one part."""
        if not 0 <= index < self.count(split):
            raise IndexError(index)
        if split == "test":
            return index * self.period + self._place(index)
        if not self.period:
            return index
        stretch, offset = divmod(index, self.period - 1)
        return stretch * self.period + offset + (offset >= self._place(stretch))

    def numbers(self, split: Split) -> np.ndarray:
        """The source's numbers of all rows of one part [n]."""
        held_out = np.array([self.row(n, "test") for n in range(self.count("test"))], dtype=np.int64)
        return held_out if split == "test" else np.setdiff1d(np.arange(self.rows), held_out)

    def _place(self, stretch: int) -> int:
        digest = hashlib.blake2b(stretch.to_bytes(8, "little"), digest_size=8).digest()
        return int.from_bytes(digest, "little") % self.period


class PartOfRows(Rows):
    """The rows of `rows` that are trained on, or those that are held out.

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
    """Raise UserError for the part that is held out if there is none."""
    if split == "test" and not rule.count("test"):
        why = f"holds {rule.rows} row" if rule.rows < 2 else "has eval_share 0"
        raise UserError(
            f"{source} {why}, so none of its rows is held out to evaluate on: give an eval_source, or evaluate nothing "
            "(data.num_eval_samples: 0)."
        )


# ---- several sources of one run ----


def refuse_overlaps(trained: Sequence[tuple[str, bool]], evaluated: Sequence[str]) -> None:
    """Raise UserError if some flow would train on rows that another one is evaluated on.

    Args:
        trained: sources of training rows, each with whether a share of it is held out.
        evaluated: sources that are for evaluation only.
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
    """The files or the folder that a source names."""
    place = filled(source)
    if is_url(place) or place.startswith("hub:"):
        return frozenset(listed(place) if is_pattern(place) else [place])
    found = listed(place) if is_pattern(place) else [place]
    return frozenset(str(Path(each).resolve()) for each in found)


def _overlap(here: frozenset[str], there: frozenset[str]) -> bool:
    """Whether a file or folder of one lies in the other."""
    return any(_within(each, there) for each in here) or any(_within(each, here) for each in there)


def _within(place: str, others: frozenset[str]) -> bool:
    return place in others or any(str(parent) in others for parent in Path(place).parents)

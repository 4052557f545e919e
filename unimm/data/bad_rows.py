"""Rows that cannot be used: skipped, counted by reason, named in a log, and too many of them stop the run.

What stands in for a skipped row is the next usable one, so item n stays a function of n and of the data,
whatever the number of processes and workers. A row that the run filters out by its own settings counts for nothing.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from unimm.data.characters import half_character
from unimm.data.shuffling import Rows
from unimm.errors import UserError, printable

DEFAULT_MAX_BAD_SHARE = 0.01
FEWEST_ROWS = 1000
"""Before so many rows were read their bad share says little: it is taken of this number."""
LONGEST_GAP = 10_000
"""Rows in sequence that may be skipped for one sample."""


class BadRow(UserError):
    """Why a row cannot be used: a reason to count by, and the details to name."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(detail or reason)
        self.reason, self.detail = reason, detail


class Filtered(BadRow):
    """A good row that the run does not want."""


def refuse_half_characters(text: str, name: str) -> None:
    """Raise `BadRow` for half a character, which JSON can write as \\ud800 and no text tokenizer can read."""
    if (half := half_character(text)) is not None:
        raise BadRow("half a character", f"{name} holds half a character: {half}")


@dataclass(frozen=True)
class Skipped:
    """One line of the log: row number (from 0), reason, details."""

    row: int
    reason: str
    detail: str
    filtered: bool = False  # a good row that the run does not want

    @property
    def line(self) -> str:
        return printable(json.dumps(asdict(self), ensure_ascii=False)) + "\n"


def counted(skipped: Sequence[Skipped]) -> str:
    """The skipped rows by reason, in words."""
    return ", ".join(f"{count} {reason}" for reason, count in Counter(s.reason for s in skipped).most_common())


def too_many(source: str, skipped: Sequence[Skipped], rows: int, max_bad_share: float, log: Path | None) -> UserError:
    """What stops a run that would have to skip so much of the `rows` that were looked at."""
    where = f"; all are named in {log}" if log else ""
    return UserError(
        f"{source}: {len(skipped)} of {rows} rows ({len(skipped) / rows:.1%}) cannot be used, more than max_bad_share "
        f"{max_bad_share:.1%}: {counted(skipped)}. The first is row {skipped[0].row}: {skipped[0].detail.rstrip('.')}"
        f"{where}. Mend the data, or raise max_bad_share."
    )


class SkipCount:
    """The bad rows that one reader of `total` rows has met."""

    def __init__(self, source: str, total: int, max_bad_share: float, log: Path | None = None) -> None:
        self.source, self.total, self.max_bad_share, self.log = source, total, max_bad_share, log
        self.read = 0
        self.bad: list[Skipped] = []
        self._met: set[int] = set()

    def note(self, row: int, why: BadRow) -> Skipped:
        """Count and name a bad row, once; of filtered ones there may be millions, and the settings tell which. Raises
        UserError where the share is above the limit."""
        skipped = Skipped(row, why.reason, why.detail, isinstance(why, Filtered))
        if skipped.filtered or row in self._met:
            return skipped
        self._met.add(row)
        if self.log is not None:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("a", encoding="utf-8") as log:
                log.write(skipped.line)
        self.bad.append(skipped)
        if len(self.bad) > self.max_bad_share * min(self.total, max(self.read, FEWEST_ROWS)):
            raise too_many(self.source, self.bad, min(self.total, self.read), self.max_bad_share, self.log)
        return skipped


class UsableRows(Rows):
    """`rows` without their bad ones: item i is row i, or the next one that can be used.

    Args:
        rows: raise `BadRow` for a row that cannot be used.
        source: what messages call them.
        captions: a row without a caption is a bad one.
        max_bad_share: share of the rows read that may be skipped before the run stops.
        log: file that skipped rows are named in, one JSON object a line; workers and later runs append to it.

    Raises:
        UserError: captions are asked for and no row has one.
    """

    def __init__(
        self,
        rows: Rows,
        source: str,
        *,
        captions: bool = False,
        max_bad_share: float = DEFAULT_MAX_BAD_SHARE,
        log: Path | None = None,
    ) -> None:
        if captions and rows.caption_gap is not None:
            raise UserError(f"{source} has no captions: {rows.caption_gap}.")
        self.rows, self.source, self.captions = rows, source, captions
        self.blocks, self.pool, self.column_names = rows.blocks, rows.pool, rows.column_names
        self.count = SkipCount(source, rows.total, max_bad_share, log)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        skipped = []
        for step in range(min(len(self), LONGEST_GAP)):
            row = self.usable((index + step) % len(self))
            if not isinstance(row, Skipped):
                return row
            skipped.append(row)
        raise UserError(
            f"{self.source}: none of {len(skipped)} rows from row {self.rows.number(index)} on is left: "
            f"{counted(skipped)}. The first: {skipped[0].detail.rstrip('.')}."
        )

    def require_usable(self) -> None:
        """Raise UserError if none of the first rows can be used: said at the start of a run, not within it."""
        self[0]

    def usable(self, index: int) -> dict[str, Any] | Skipped:
        """Row `index`, or why it is skipped. Raises UserError where too many are."""
        self.count.read += 1
        try:
            row = self.rows[index]
            if self.captions and not row["text"].strip():
                raise BadRow("no caption", f"{row['key']} has an empty caption")
        except BadRow as bad:
            return self.count.note(self.rows.number(index), bad)
        return row

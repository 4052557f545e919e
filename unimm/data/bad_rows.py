"""Handling of bad rows: skip them, count them by reason, log them, and stop the run if there are too many.

A skipped row is replaced by the next usable one, so item n stays a function of n and the data, for any number of
processes and workers. Rows that the run's own settings filter out are not counted as bad.
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
"""The bad share is computed over at least this many rows: over fewer it is too noisy."""
LONGEST_GAP = 10_000
"""Maximum number of consecutive rows that may be skipped for one sample."""


class BadRow(UserError):
    """Raised for a row that cannot be used: `reason` is counted, `detail` is logged."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(detail or reason)
        self.reason, self.detail = reason, detail


class Filtered(BadRow):
    """Raised for a good row that the run's settings filter out."""


def refuse_half_characters(text: str, name: str) -> None:
    """Raise `BadRow` for a lone surrogate, which JSON can write as \\ud800 and no text tokenizer can encode."""
    if (half := half_character(text)) is not None:
        raise BadRow("half a character", f"{name} holds half a character: {half}")


@dataclass(frozen=True)
class Skipped:
    """One line of the log: row number (from 0), reason, detail."""

    row: int
    reason: str
    detail: str
    filtered: bool = False  # a good row that the run's settings filter out

    @property
    def line(self) -> str:
        return printable(json.dumps(asdict(self), ensure_ascii=False)) + "\n"


def counted(skipped: Sequence[Skipped]) -> str:
    """Format the skipped rows by reason, as "3 damaged image, 1 no caption"."""
    return ", ".join(f"{count} {reason}" for reason, count in Counter(s.reason for s in skipped).most_common())


def too_many(source: str, skipped: Sequence[Skipped], rows: int, max_bad_share: float, log: Path | None) -> UserError:
    """Return the error that stops a run if too many of the `rows` read so far are bad."""
    where = f"; all are named in {log}" if log else ""
    return UserError(
        f"{source}: {len(skipped)} of {rows} rows ({len(skipped) / rows:.1%}) cannot be used, more than max_bad_share "
        f"{max_bad_share:.1%}: {counted(skipped)}. The first is row {skipped[0].row}: {skipped[0].detail.rstrip('.')}"
        f"{where}. Mend the data, or raise max_bad_share."
    )


class SkipCount:
    """Counts the bad rows that one reader of `total` rows has met."""

    def __init__(self, source: str, total: int, max_bad_share: float, log: Path | None = None) -> None:
        self.source, self.total, self.max_bad_share, self.log = source, total, max_bad_share, log
        self.read = 0
        self.bad: list[Skipped] = []
        self._met: set[int] = set()

    def note(self, row: int, why: BadRow) -> Skipped:
        """Count and log a bad row, once; filtered rows are not logged, as there may be millions. Raises UserError if
        the share of bad rows exceeds the limit."""
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
    """A view of `rows` that skips bad rows: item i is row i, or the next usable one.

    Args:
        rows: must raise `BadRow` for a row that cannot be used.
        source: name for error messages.
        captions: treat a row without a caption as bad.
        max_bad_share: share of the rows read that may be skipped before the run stops.
        log: JSON Lines file of the skipped rows; workers and later runs append to it.

    Raises:
        UserError: `captions` is set and no row has a caption.
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
        """Raise UserError if none of the first rows can be used, so that a run fails at its start."""
        self[0]

    def usable(self, index: int) -> dict[str, Any] | Skipped:
        """Return row `index`, or why it is skipped. Raises UserError if too many rows are skipped."""
        self.count.read += 1
        try:
            row = self.rows[index]
            if self.captions and not row["text"].strip():
                raise BadRow("no caption", f"{row['key']} has an empty caption")
        except BadRow as bad:
            return self.count.note(self.rows.number(index), bad)
        return row

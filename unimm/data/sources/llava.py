"""Conversations in LLaVA's format: a JSON list or JSON Lines file, and a folder of images.

    {"image": "1.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt", ...}]}

The whole file is checked before the first step. Bad rows (`BadRow`) are skipped, counted by reason and logged, and the
run stops if their share exceeds a limit. An image that turns out to be damaged only when it is loaded counts too; the
next row replaces it, so sample n stays a function of n. Rows are kept as one block of bytes, which worker processes
share.

Reads the files of LLaVA-1.5 (https://github.com/haotian-liu/LLaVA): 558K and 595K captions, mix665k. `image` may be a
list. A single `<image>` in a turn moves in front of its text, followed by a line break, as LLaVA trains; several stay
where they are. A leading assistant turn is dropped, as in LLaVA.
"""

import copy
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unimm.data.bad_rows import (
    DEFAULT_MAX_BAD_SHARE,
    BadRow,
    Skipped,
    counted,
    refuse_half_characters,
    too_many,
)
from unimm.data.conversations import Message
from unimm.data.held_out import HeldOut, require_held_out
from unimm.data.images import load_image, unreadable_images
from unimm.data.shapes.prompts import Split
from unimm.errors import UserError, one_line
from unimm.runs.provenance import write_atomically

LLAVA_SUFFIXES = (".json", ".jsonl")
PLACEHOLDER = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
IMAGE_LENGTH = 128
"""Number of words that an image counts for if rows are grouped by length, as in LLaVA's `lengths`."""


@dataclass(frozen=True)
class Row:
    """A parsed row: image file names, and turns of (role, text with placeholders)."""

    images: tuple[str, ...]
    turns: tuple[tuple[str, str], ...]

    @property
    def length(self) -> int:
        """Return the length in words and images, as LLaVA's sampler counts it; negative without an image."""
        words = sum(len(text.split()) for _, text in self.turns)
        return words + IMAGE_LENGTH if self.images else -words


@dataclass(frozen=True)
class LlavaOptions:
    """How a LLaVA file is read.

    Args:
        image_folder: folder that the image names are relative to.
        max_bad_share: share of the rows that may be skipped before the run stops.
        drop_questions: keep only the images of the user's turns, as in LLaVA's pretraining.
        log: JSON Lines file of the skipped rows; the counts go to the same name with .report.json. None writes nothing.
    """

    image_folder: Path
    max_bad_share: float = DEFAULT_MAX_BAD_SHARE
    drop_questions: bool = False
    log: Path | None = None


class LlavaConversations:
    """The usable rows of a LLaVA file, in file order.

    Raises:
        UserError: the file cannot be read, has no usable row, or more than `max_bad_share` of its rows are bad.
    """

    blocks: None = None
    pool = 1

    def __init__(self, path: Path, options: LlavaOptions) -> None:
        self.path, self.options = path, options
        records = list(_records(path))
        self.total = len(records)
        parsed = list(_parsed(records))
        rows = [(n, row) for n, row in enumerate(parsed) if isinstance(row, Row)]
        missing = _unreadable({name for _, row in rows for name in row.images}, options.image_folder)
        bad = {n: row for n, row in enumerate(parsed) if isinstance(row, BadRow)}
        bad |= {n: missing[name] for n, row in rows for name in reversed(row.images) if name in missing}
        self.skipped = [Skipped(n, why.reason, why.detail) for n, why in sorted(bad.items())]
        kept = [(n, row) for n, row in rows if n not in bad]
        self.numbers = np.array([n for n, _ in kept], dtype=np.int64)
        self.modality_lengths = np.array([row.length for _, row in kept], dtype=np.int64)
        self._rows = np.arange(len(kept))  # the subset of the kept rows in this part
        pieces = [json.dumps([row.images, row.turns]).encode() for _, row in kept]
        self._bytes, self._ends = b"".join(pieces), np.cumsum([0, *map(len, pieces)])
        self._damaged: set[int] = set()
        self._write_log()
        self._stop_if_too_many(self.skipped)
        if not kept:
            raise UserError(f"{path} holds no row that can be used: {counted(self.skipped)}.")

    def __len__(self) -> int:
        return len(self.numbers)

    def part(self, share: float, split: Split) -> "LlavaConversations":
        """Return the training rows, or the held-out `share` of the rows (`unimm.data.held_out`).

        Raises:
            UserError: nothing can be held out.
        """
        rule = HeldOut(len(self), share)
        require_held_out(rule, split, str(self.path))
        if rule.count(split) == len(self):
            return self
        chosen, part = rule.numbers(split), copy.copy(self)
        part.numbers, part.modality_lengths = self.numbers[chosen], self.modality_lengths[chosen]
        part._rows = self._rows[chosen]
        return part

    def row(self, index: int) -> Row:
        """Return the usable row `index`."""
        place = self._rows[index]
        images, turns = json.loads(self._bytes[self._ends[place] : self._ends[place + 1]])
        return Row(tuple(images), tuple((role, text) for role, text in turns))

    def messages(self, index: int) -> list[Message]:
        """Return the messages of row `index` modulo the number of rows, or of the next row if an image is damaged."""
        for step in range(len(self)):
            place = (index + step) % len(self)
            row = self.row(place)
            try:
                images = [load_image(self.options.image_folder / name) for name in row.images]
            except UserError as error:
                self._skip_damaged(int(self.numbers[place]), str(error))
                continue
            return list(messages_of(row, images, self.options.drop_questions))
        raise UserError(f"No row of {self.path} is left whose images can be read.")

    def _skip_damaged(self, number: int, detail: str) -> None:
        """Log a row with a damaged image, once; the log file also shares the count between worker processes."""
        if number in self._damaged:
            return
        self._damaged.add(number)
        found = [Skipped(n, "damaged image", detail) for n in sorted(self._damaged)]
        if self.options.log is not None:
            with self.options.log.open("a", encoding="utf-8") as log:
                log.write(Skipped(number, "damaged image", detail).line)
            lines = self.options.log.read_text(encoding="utf-8").splitlines()
            named = {line["row"]: Skipped(**line) for line in map(json.loads, lines)}
            found = [line for n, line in named.items() if line.reason == "damaged image"]
        self._stop_if_too_many([*self.skipped, *found])

    def _write_log(self) -> None:
        log = self.options.log
        if log is None:
            return
        log.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(log, "".join(line.line for line in self.skipped))
        report = {
            "source": str(self.path),
            "rows": self.total,
            "usable": len(self),
            "with images": int((self.modality_lengths > 0).sum()),
            "skipped": dict(Counter(line.reason for line in self.skipped)),
            "max_bad_share": self.options.max_bad_share,
        }
        write_atomically(log.with_suffix(".report.json"), json.dumps(report, indent=2) + "\n")

    def _stop_if_too_many(self, skipped: Sequence[Skipped]) -> None:
        if len(skipped) <= self.options.max_bad_share * self.total:
            return
        raise too_many(str(self.path), skipped, self.total, self.options.max_bad_share, self.options.log)


def open_llava(path: Path, options: LlavaOptions) -> LlavaConversations:
    """Open a LLaVA file; the result is cached, so several streams check an unchanged file only once."""
    require_files(path, options.image_folder)
    return _opened(path, options, os.stat(path).st_mtime_ns)


def require_files(path: Path, image_folder: Path) -> None:
    """Raise UserError if the file or its image folder is missing."""
    if not path.is_file():
        raise UserError(
            f"There is no file {path} with conversations; set $UNIMM_DATA to the folder that holds the data."
        )
    if not image_folder.is_dir():
        raise UserError(f"The folder of the images of {path}, image_folder, is {image_folder}: no such folder.")


@lru_cache(maxsize=4)
def _opened(path: Path, options: LlavaOptions, changed: int) -> LlavaConversations:
    return LlavaConversations(path, options)


def parse_row(record: Any) -> Row:
    """Parse and check a record: alternating turns, an answer, as many placeholders as images.

    Raises:
        BadRow: a check fails.
    """
    turns = _turns(record)
    images = record.get("image") or []
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(name, str) and name for name in images):
        raise BadRow("wrong image field", f"image is {images!r:.80}")
    for role, text in turns:
        if role != "user" and PLACEHOLDER in text:
            raise BadRow("image outside a question", f"the {role}'s turn {text!r:.80} holds {PLACEHOLDER}")
    placeholders = sum(text.count(PLACEHOLDER) for _, text in turns)
    if images and not placeholders:  # some files omit the placeholder: put the images first
        first = next(n for n, (role, _) in enumerate(turns) if role == "user")
        turns[first] = ("user", PLACEHOLDER * len(images) + turns[first][1])
    elif placeholders != len(images):
        raise BadRow("images do not match", f"{len(images)} images and {placeholders} {PLACEHOLDER}")
    return Row(tuple(images), tuple(turns))


def _turns(record: Any) -> list[tuple[str, str]]:
    given = record.get("conversations") if isinstance(record, dict) else None
    if not isinstance(given, list) or not given:
        raise BadRow("no conversation", f"{record!r:.80} has no list `conversations`")
    turns = []
    for turn in given:
        role = ROLES.get(str(turn.get("from")).lower()) if isinstance(turn, dict) else None
        if role is None or not isinstance(turn.get("value"), str):
            raise BadRow("wrong turn", f"{turn!r:.80} is no turn with `from` (human, gpt, system) and `value`")
        refuse_half_characters(turn["value"], f"the {role}'s turn")
        turns.append((role, turn["value"]))
    system = turns[:1] if turns[0][0] == "system" else []
    said = turns[len(system) :]
    said = said[1:] if said and said[0][0] == "assistant" else said
    check_order([role for role, _ in system + said])
    return system + said


def check_order(roles: Sequence[str]) -> None:
    """Raise BadRow unless user and assistant alternate, after at most one system turn, with at least one answer."""
    talk = roles[1:] if roles and roles[0] == "system" else roles
    named = ", ".join(roles) or "nobody"
    if list(talk) != [("user", "assistant")[n % 2] for n in range(len(talk))]:
        raise BadRow("turns out of order", f"the turns are by {named:.200}")
    if len(talk) < 2:
        raise BadRow("no answer", f"the turns are by {named}")


def messages_of(row: Row, images: Sequence[Image.Image], drop_questions: bool = False) -> Iterator[Message]:
    """Yield the turns of a row as messages, with images instead of placeholders."""
    remaining = iter(images)
    for role, text in row.turns:
        raw_images = text.count(PLACEHOLDER)
        if raw_images == 1:
            rest = text.replace(PLACEHOLDER, "").strip()
            pieces = ["", f"\n{rest}" if rest else ""]
        else:
            pieces = text.split(PLACEHOLDER)
        content: list[dict[str, Any]] = []
        for n, piece in enumerate(pieces):
            if n:
                content.append({"type": "image", "image": next(remaining)})
            if piece and not (drop_questions and role == "user"):
                content.append({"type": "text", "text": piece})
        yield {"role": role, "content": content or [{"type": "text", "text": ""}]}


def _records(path: Path) -> Iterable[Any]:
    """Read the records of a file; a line that is not JSON becomes a `BadRow` in the list."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}.") from None
    if path.suffix == ".jsonl":
        return [_json_line(line) for line in text.split("\n") if line.strip()]
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is not whole JSON: {error.msg} in line {error.lineno}, column {error.colno}."
        ) from None
    except (ValueError, RecursionError) as error:  # a number too long, brackets too deep
        raise UserError(f"{path} cannot be read as JSON: {one_line(error)}.") from None
    if not isinstance(records, list):
        raise UserError(f"{path} holds a {type(records).__name__}, not a list of conversations.")
    return records


def _json_line(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return BadRow("not JSON", f"{error.msg} in column {error.colno}: {line[:60]!r}")
    except (ValueError, RecursionError) as error:
        return BadRow("not JSON", f"{one_line(error)}: {line[:60]!r}")


def _parsed(records: Iterable[Any]) -> Iterator[Row | BadRow]:
    for record in records:
        try:
            yield record if isinstance(record, BadRow) else parse_row(record)
        except BadRow as bad:
            yield bad


def _unreadable(names: Iterable[str], folder: Path) -> dict[str, BadRow]:
    """Return {name: `BadRow`} for the images whose file is missing or has no valid image header."""
    paths = {folder / name: name for name in names}
    return {
        paths[path]: BadRow("unreadable image" if os.path.exists(path) else "missing image", str(error))
        for path, error in unreadable_images(paths).items()
    }

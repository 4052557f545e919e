"""Prompts of DPG-Bench: the question file, or a list of prompts to draw only."""

import csv
import hashlib
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unimm.errors import UserError
from unimm.evaluation.dpg.arguments import GET_CSV
from unimm.evaluation.dpg.rules import COLUMNS, read_questions

OFFICIAL_CSV = "98457fc9901943f51ff9a30367250fc292533bed"  # git blob hash of the published dpg_bench.csv

Rows = list[dict[str, Any]]  # rows of the question file, each with its index as `row`


@dataclass(frozen=True)
class Prompts:
    """Prompts by item, their question rows, and the git blob hash of the question file."""

    texts: dict[str, str]
    rows: dict[str, Rows] = field(default_factory=dict)
    blob: str | None = None

    def limited(self, limit: int | None) -> "Prompts":
        """Return the first `limit` prompts of the file."""
        kept = dict(list(self.texts.items())[:limit])
        return Prompts(kept, {item: rows for item, rows in self.rows.items() if item in kept}, self.blob)


def read_question_file(path: str | Path) -> Prompts:
    """Read the prompts and questions of a dpg_bench.csv.

    Raises:
        UserError: the file is missing (the message says what to download) or is not a question file.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no question file {path}: get {GET_CSV}; git hash-object gives {OFFICIAL_CSV}.")
    content = path.read_bytes()
    try:
        lines = list(csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline="")))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as a CSV file: {error}.") from error
    missing = [name for name in (*COLUMNS, "text") if name not in (lines[0] if lines else {})]
    if missing:
        raise UserError(f"{path} has no column {', '.join(missing)}, or no rows: get {GET_CSV}.")
    read_questions(lines)  # validate the questions before anything is drawn
    texts: dict[str, str] = {}
    rows: dict[str, Rows] = {}
    for index, line in enumerate(lines):
        texts.setdefault(line["item_id"], line["text"])
        rows.setdefault(line["item_id"], []).append({"row": index, **{name: line[name] for name in COLUMNS}})
    return Prompts(texts, rows, hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest())


def read_prompts(path: str | Path) -> Prompts:
    """Read prompts without questions, lines of {"item_id": ..., "prompt": ...}. Raise UserError for other files."""
    try:
        lines = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
        texts = {str(line["item_id"]): str(line["prompt"]) for line in lines}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read as lines of item_id and prompt: {error!r}.") from error
    if not texts or len(texts) < len(lines):
        raise UserError(f"{path} holds {len(lines)} lines and {len(texts)} different prompts.")
    return Prompts(texts)

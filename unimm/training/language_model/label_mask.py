"""Visualization of the label mask of a batch: tokens with a loss are highlighted, in a terminal and as an HTML page."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from torch import Tensor

from unimm.data.text.collators import IGNORED
from unimm.runs.provenance import write_atomically

Batch = Mapping[str, Mapping[str, Tensor]]
_LEARNED, _SEEN, _END = "\x1b[30;42m", "\x1b[2m", "\x1b[0m"
_PAGE = """<!doctype html><meta charset="utf-8"><title>Label mask</title>
<style>body{{font:15px/1.5 system-ui;margin:2em;max-width:60em}}pre{{white-space:pre-wrap;border:1px solid #ccc;
padding:1em;border-radius:6px}}mark{{background:#a6e3a1;color:#000}}i{{color:#777}}</style>
<h1>Label mask</h1><p><mark>learned</mark>, seen; image tokens as their number.</p>
{rows}
"""


@dataclass(frozen=True)
class Piece:
    """A run of neighboring tokens, all with or all without a label, and all image tokens or all text."""

    text: str
    learned: bool
    tokens: int


def pieces(input_ids: Tensor, labels: Tensor, tokenizer: Any, image_token_id: int) -> list[Piece]:
    """Split a row [L] of a batch into pieces, without the padding after the last token."""
    kinds = [
        (token, label != IGNORED, token == image_token_id)
        for token, label in zip(input_ids.tolist(), labels.tolist(), strict=True)
    ]
    while kinds and kinds[-1][0] == tokenizer.pad_token_id and not kinds[-1][1]:
        kinds.pop()
    found = []
    for (learned, image), run in groupby(kinds, key=lambda kind: kind[1:]):
        ids = [token for token, *_ in run]
        text = f"‹{len(ids)} image tokens›" if image else tokenizer.decode(ids, skip_special_tokens=False)
        found.append(Piece(text, learned, len(ids)))
    return found


def rows_of(batch: Batch, processor: Any, per_flow: int = 2) -> list[tuple[str, list[Piece]]]:
    """Return the first rows of every flow, each with the flow's name."""
    return [
        (flow, pieces(ids, labels, processor.tokenizer, processor.image_token_id))
        for flow, inputs in sorted(batch.items())
        for ids, labels in zip(inputs["input_ids"][:per_flow], inputs["labels"][:per_flow], strict=True)
    ]


def in_terminal(rows: Sequence[tuple[str, list[Piece]]]) -> str:
    """Format rows with ANSI colors: labeled tokens on green, the rest faint. Control characters of a sample are
    escaped."""
    shown = []
    for flow, row in rows:
        words = (f"{_LEARNED if p.learned else _SEEN}{_printable(p.text)}{_END}" for p in row)
        shown.append(f"[{flow}] {''.join(words)}")
    return "\n".join(shown)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text)


def write_page(rows: Sequence[tuple[str, list[Piece]]], path: Path) -> None:
    """Write rows as an HTML page without scripts."""
    shown = []
    for flow, row in rows:
        learned, count = sum(p.tokens for p in row if p.learned), sum(p.tokens for p in row)
        words = (f"<{tag}>{html.escape(p.text)}</{tag}>" for p in row for tag in ["mark" if p.learned else "span"])
        shown.append(
            f"<h2>{html.escape(flow)} <i>{learned} of {count} tokens learned</i></h2><pre>{''.join(words)}</pre>"
        )
    write_atomically(path, _PAGE.format(rows="\n".join(shown)))

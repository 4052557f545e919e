"""Agreement of a scorer with people, on GenEval's annotations with five raters per image (arXiv 2310.11513).

Raters were asked for the number, colors and positions of objects, not whether the image is correct, so a rater's
verdict on the prompt is derived from these answers by rule (`rules`); the majority decides. `caption` is the majority
on the caption as a whole (the grade "fully captures the meaning"). The paper's detector agrees with the majority on
83 % of the images.

Some rows of one published file are split at a line break inside a rater's free text; they are joined again.
"""

import csv
import gzip
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unimm.errors import UserError, one_line

FULLY_CAPTURED = "4"  # the best of four grades of how well an image fits its caption
PAPER_AGREEMENT = 0.83
_COLUMNS = ("Input.index", "Input.caption", "Answer.task-count-0", "Answer.task-color-0", "Answer.task-quality")
_AXES = {"left of": ("x", "left"), "right of": ("x", "right"), "above": ("y", "above"), "below": ("y", "below")}

Key = tuple[int, int]  # (prompt index, sample)


class HumanVerdict(NamedTuple):
    """The majority's verdict on one image: by the prompt's rules, and on the caption as a whole."""

    rules: bool
    caption: bool
    raters: int


class Comparison(NamedTuple):
    """Agreement and confusion counts of a scorer and people on the same images."""

    images: int
    agreement: float
    kappa: float
    both_right: int
    only_people: int
    only_scorer: int
    both_wrong: int


def read_annotations(path: str | Path) -> list[dict[str, str]]:
    """Read the rows of an annotation file (`.csv` or `.csv.gz`), one per image and rater.

    Raises:
        UserError: the file cannot be read, or is not one of GenEval's annotation files.
    """
    path = Path(path)
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        rows = list(csv.reader(io.StringIO(data.decode("utf-8"), newline="")))
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"Cannot read the annotations {path}: {one_line(error)}.") from None
    header = rows[0] if rows else []
    if missing := [name for name in _COLUMNS if name not in header]:
        raise UserError(f"{path} is no annotation file of GenEval: it has no column {', '.join(missing)}.")
    return [dict(zip(header, row, strict=True)) for row in _joined(rows[1:], len(header), path)]


def human_verdicts(
    annotations: Iterable[Mapping[str, str]], prompts: Sequence[Mapping[str, Any]]
) -> dict[Key, HumanVerdict]:
    """Compute the majority verdict per image, keyed by (prompt index, sample).

    Raises:
        UserError: an annotated caption is not the prompt of that index.
    """
    votes: dict[Key, list[tuple[bool, bool]]] = {}
    for row in annotations:
        item, sample = (int(part) for part in row["Input.index"].split("_"))
        if item >= len(prompts) or prompts[item]["prompt"] != row["Input.caption"]:
            raise UserError(
                f"The annotations speak of {row['Input.caption']!r}, which is not prompt {item} of the list."
            )
        fits = fulfils(row, prompts[item]), row["Answer.task-quality"] == FULLY_CAPTURED
        votes.setdefault((item, sample), []).append(fits)
    return {
        key: HumanVerdict(_majority(rules for rules, _ in cast), _majority(whole for _, whole in cast), len(cast))
        for key, cast in sorted(votes.items())
    }


def fulfils(row: Mapping[str, str], prompt: Mapping[str, Any]) -> bool:
    """Return whether one rater's answers satisfy the prompt.

    Counting prompts require the exact number, the others at least the rule's count; a color must be among those that
    the rater named; the position of object 1 relative to object 0 must match.
    """
    exact = bool(prompt.get("exclude"))
    for index, rule in enumerate(prompt["include"]):
        count = int(float(row.get(f"Answer.task-count-{index}") or 0))
        if count < rule["count"] or (exact and count != rule["count"]):
            return False
        if "color" in rule and rule["color"] not in row[f"Answer.task-color-{index}"].split("|"):
            return False
        if "position" in rule:
            axis, side = _AXES[rule["position"][0]]
            if row[f"Answer.task-position-{axis}"] != side:
                return False
    return True


def compare(verdicts: Mapping[Key, bool], people: Mapping[Key, bool]) -> Comparison:
    """Compute agreement, confusion counts and Cohen's kappa on the images that both scored.

    Raises:
        UserError: they have no image in common.
    """
    shared = sorted(verdicts.keys() & people.keys())
    if not shared:
        raise UserError(
            f"None of the {len(verdicts)} scored images is among the {len(people)} annotated ones: score the "
            "annotated images (djghosh/aigen-images on the Hub) under their official numbers."
        )
    scorer = np.array([verdicts[key] for key in shared])
    human = np.array([people[key] for key in shared])
    cells = [int(((scorer == s) & (human == h)).sum()) for s, h in ((1, 1), (0, 1), (1, 0), (0, 0))]
    both_right, only_people, only_scorer, both_wrong = cells
    agreed = float((scorer == human).mean())
    return Comparison(len(shared), agreed, cohens_kappa(scorer, human), *cells)


def compare_by_tag(
    verdicts: Mapping[Key, bool], people: Mapping[Key, bool], prompts: Sequence[Mapping[str, Any]]
) -> dict[str, Comparison]:
    """Run `compare` per tag that both scored, in order of first appearance, and on `all` images."""
    shared = sorted(verdicts.keys() & people.keys())
    result = {}
    for tag in dict.fromkeys(prompts[item]["tag"] for item, _ in shared):
        result[tag] = compare({key: verdicts[key] for key in shared if prompts[key[0]]["tag"] == tag}, people)
    return result | {"all": compare(verdicts, people)}


def agreement_table(rows: Mapping[str, Comparison]) -> str:
    """Format one line per tag with agreement, kappa and the four confusion counts."""
    titles = ("images", "agree", "kappa", "both", "people", "scorer", "neither")
    lines = ["  " + " " * 14 + "".join(f"{title:>10}" for title in titles)]
    for tag, row in rows.items():
        cells = (row.both_right, row.only_people, row.only_scorer, row.both_wrong)
        numbers = f"{row.images:>10}{row.agreement:>10.3f}{row.kappa:>10.3f}"
        lines.append(f"  {tag:<14}{numbers}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)


def cohens_kappa(a: np.ndarray, b: np.ndarray) -> float:
    """Compute Cohen's kappa of two binary raters: 0 for chance; 1 if both always give the same single verdict."""
    observed = float((a == b).mean())
    expected = float(a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean()))
    return 1.0 if expected == 1 else (observed - expected) / (1 - expected)


def _majority(votes: Iterable[bool]) -> bool:
    """Return whether more than half of the votes are true; a tie is no majority."""
    cast = list(votes)
    return 2 * sum(cast) > len(cast)


def _joined(rows: Sequence[list[str]], width: int, path: Path) -> list[list[str]]:
    """Join split rows to `width` fields: a short row continues, inside its last field, in the next row."""
    whole: list[list[str]] = []
    torn: list[str] = []
    for number, row in enumerate(rows, 2):
        if not row:
            continue
        if torn:
            row = [*torn[:-1], f"{torn[-1]}\n{row[0]}", *row[1:]]
        if len(row) > width:
            raise UserError(f"{path}, row {number} has {len(row)} fields and the header {width}: the file is damaged.")
        torn = row if len(row) < width else []
        if not torn:
            whole.append(row)
    if torn:
        raise UserError(f"{path} ends in the middle of a row of {len(torn)} fields; the header has {width}.")
    return whole

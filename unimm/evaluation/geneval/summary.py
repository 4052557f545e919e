"""GenEval's result table from the records of a run: six tags, their mean, intervals, and why images failed.

Only the records are read, so the table can be recomputed later without a model. `overall` is the unweighted mean of the
six tags, computed only if all six have images; `correct_images` is the mean over images. The images of one prompt are
not independent, so intervals resample prompts within their tags.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from unimm.evaluation.geneval.rules import TAGS, summary
from unimm.evaluation.metrics.bootstrap import bootstrap_mean
from unimm.evaluation.runs.records import UNREADABLE, Record, unreadable_names

# Rule that failed -> pattern of its line in a verdict's reason; the first match wins.
_PATTERNS = {
    UNREADABLE: rf"{UNREADABLE}: ",
    "unparsed": r"unparsed answer to ",
    "no target": r"no target for ",
    "too many": r"expected .+<\d+, found \d+$",
    "too few": r"expected .+>=\d+, found \d+$",
    "color": r"expected .+>=\d+, found \d+ \w+; and ",
    "position": r"expected .+ target, found .* ?target$",
    "answer": r".+\? expected \S+, answered \S+$",
}
_RULES = {name: re.compile(pattern) for name, pattern in _PATTERNS.items()}


def failed_rules(reason: str) -> list[str]:
    """Return the kind of failed rule for each line of a verdict's reason.

    Raises:
        ValueError: a line matches no rule.
    """
    kinds = []
    for line in filter(None, reason.split("\n")):
        kind = next((name for name, pattern in _RULES.items() if pattern.match(line)), None)
        if kind is None:
            raise ValueError(f"no rule gives the reason {line!r}")
        kinds.append(kind)
    return kinds


def summarize_records(records: Sequence[Record]) -> dict[str, Any]:
    """Return the table: `scores` {tags, overall, correct_images, correct_prompts}; `intervals` [low, high] of the tags,
    overall and correct_images; `failed`, the count per kind of rule; `images`, `prompts`, `missing_tags`; `unparsed`,
    how many colors or answers were guessed or could not be read; `unreadable`, the items whose image could not be read;
    and, if the scorer is a detector, `plain`, the scores without guesses."""
    rows = [{"tag": record.inputs["tag"], "prompt": record.item, "correct": record.verdict} for record in records]
    readings = [record.raw_scores.get("plain") for record in records]
    plain = [row | {"correct": reading} for row, reading in zip(rows, readings, strict=True) if reading is not None]
    tags = [tag for tag in TAGS if any(row["tag"] == tag for row in rows)]
    missing = [tag for tag in TAGS if tag not in tags]
    # Without all six tags there is no overall: a mean over fewer is not comparable.
    scores = _scores(rows, tags)
    kinds = Counter(kind for record in records for kind in failed_rules(record.reason))
    return {
        "scores": scores,
        **({"plain": _scores(plain, tags)} if len(plain) == len(rows) else {}),
        "unparsed": sum(int(record.raw_scores.get("unparsed", 0)) for record in records),
        "intervals": _intervals(rows, tags, with_overall=not missing),
        "failed": dict(sorted(kinds.items())),
        "images": len(rows),
        "prompts": len({row["prompt"] for row in rows}),
        "missing_tags": missing,
        "unreadable": unreadable_names(records),
    }


def table(summarized: dict[str, Any]) -> str:
    """Format one line per score, with its interval."""
    scores, plain = summarized["scores"], summarized.get("plain", {})
    lines = [f"  {'':<16} {'':>7}  {'':<14}  {'plain':>7}"] if plain else []
    for name in [name for name in (*TAGS, "overall", "correct_images", "correct_prompts") if name in scores]:
        low, high = summarized["intervals"].get(name) or (None, None)
        spread = "" if low is None else f"[{low:.3f}, {high:.3f}]"
        beside = f"  {plain[name]:7.3f}" if name in plain else ""
        lines.append(f"  {name:<16} {scores[name]:7.3f}  {spread:<14}{beside}".rstrip())
    if lost := summarized["unreadable"]:
        lines.append(f"  {len(lost)} images cannot be read, of {', '.join(dict.fromkeys(lost))}")
    lines.append(f"  {summarized['unparsed']} colors or answers had to be guessed or could not be read")
    if summarized["missing_tags"]:
        lines.append(f"  no overall: no image of {', '.join(summarized['missing_tags'])}")
    failed = ", ".join(f"{name} {count}" for name, count in summarized["failed"].items())
    return "\n".join(
        [*lines, f"  {summarized['images']} images of {summarized['prompts']} prompts; failed: {failed or 'none'}"]
    )


def _scores(rows: Sequence[dict[str, Any]], tags: Sequence[str]) -> dict[str, float]:
    return summary(rows) if len(tags) == len(TAGS) else {tag: _mean(rows, tag) for tag in tags}


def _mean(rows: Sequence[dict[str, Any]], tag: str) -> float:
    scored = [bool(row["correct"]) for row in rows if row["tag"] == tag]
    return sum(scored) / len(scored)


def _intervals(rows: Sequence[dict[str, Any]], tags: Sequence[str], *, with_overall: bool) -> dict[str, Any]:
    """Compute [low, high] per score, None if a tag has fewer than two prompts."""
    spread = {}
    for tag in tags:
        of_tag = [row for row in rows if row["tag"] == tag]
        spread[tag] = bootstrap_mean([float(row["correct"]) for row in of_tag], [row["prompt"] for row in of_tag])
    values, prompts = [float(row["correct"]) for row in rows], [row["prompt"] for row in rows]
    if with_overall:
        spread["overall"] = bootstrap_mean(values, prompts, [row["tag"] for row in rows])
        spread["correct_images"] = bootstrap_mean(values, prompts)
    return {name: None if each.low is None else [each.low, each.high] for name, each in spread.items()}

"""Scores of an evaluation run with bootstrap intervals, and paired differences between two runs.

Pure functions of records. A score is a mean; its interval resamples whole clusters (samples of one item, or of one
`cluster` named in the inputs). Verdicts are averaged within tags and then over tags, like GenEval's overall score;
measurements without a verdict are averaged over all samples.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from unimm.evaluation.metrics.bootstrap import Difference, Interval, bootstrap_mean, paired_bootstrap
from unimm.evaluation.runs.records import Record

VERDICT = "correct"
SHARES = (VERDICT, "plain", "strict")
"""Verdicts, and alternative readings of them, which are averaged alike: within tags, then over tags."""


@dataclass(frozen=True)
class Measure:
    """One score of one part of a run.

    Args:
        samples: number of records that it is a mean of.
        scorer: the scorer that gave the verdicts; empty for measurements without a verdict.
        by_tag: the score of each tag, if there are several.
    """

    part: str
    name: str
    interval: Interval
    samples: int
    scorer: str = ""
    by_tag: dict[str, Interval] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """One score of two runs on their common samples; `difference` is None if their scorers differ."""

    part: str
    name: str
    first: float
    second: float
    samples: int
    scorers: tuple[str, str]
    difference: Difference | None


def part_of(record: Record) -> str:
    return str(record.inputs.get("part", ""))


def tag_of(record: Record) -> str:
    return str(record.inputs.get("tag", ""))


def described(scorer: Mapping[str, Any]) -> str:
    """Describe a scorer in a few words, with its components in parentheses and its hash shortened."""
    words = [str(scorer[name]) for name in ("name", "version") if scorer.get(name)]
    for name, value in scorer.items():
        if name not in ("name", "version", "sha256"):
            words.append(f"{name} ({described(value)})" if isinstance(value, Mapping) else f"{name} {value}")
    return ", ".join([*words, *([f"sha256 {scorer['sha256'][:12]}"] if scorer.get("sha256") else [])])


def measures(records: Sequence[Record]) -> list[Measure]:
    """Compute every score of a run: for each part the verdicts, then the measurements, in the order of the records."""
    return [
        _measure(part, name, rows) for part, members in _by_part(records).items() for name, rows in _scores_of(members)
    ]


def compare(first: Sequence[Record], second: Sequence[Record]) -> list[Comparison]:
    """Compute second minus first for every score, on the samples for which both runs have it."""
    others = _by_part(second)
    found = []
    for part, members in _by_part(first).items():
        theirs = dict(_scores_of(others.get(part, [])))
        for name, rows in _scores_of(members):
            if name in theirs and (comparison := _compared(part, name, rows, theirs[name])) is not None:
                found.append(comparison)
    return found


def value_of(record: Record, name: str) -> float:
    return float(record.raw_scores[name]) if record.verdict is None or name != VERDICT else float(record.verdict)


def _by_part(records: Iterable[Record]) -> dict[str, list[Record]]:
    parts: dict[str, list[Record]] = {}
    for record in records:
        parts.setdefault(part_of(record), []).append(record)
    return parts


def _scores_of(records: Sequence[Record]) -> list[tuple[str, list[Record]]]:
    """Return the names of the scores that can be averaged, each with the records that have it."""
    names = dict.fromkeys(
        name
        for record in records
        for name, value in record.raw_scores.items()
        if _is_number(name, value) and name != VERDICT
    )
    scored = [record for record in records if record.verdict is not None]
    found = [(VERDICT, scored)] if scored else []
    return found + [(name, [r for r in records if _is_number(name, r.raw_scores.get(name))]) for name in names]


def _is_number(name: str, value: Any) -> bool:
    """Return whether the value can be averaged: a number, or a bool of a reading in SHARES."""
    return isinstance(value, int | float) and (name in SHARES or not isinstance(value, bool))


def _measure(part: str, name: str, records: list[Record]) -> Measure:
    values = [value_of(record, name) for record in records]
    clusters, strata = _clusters(records), _strata(name, records)
    by_tag = {}
    for tag in dict.fromkeys(strata or []):
        rows = [record for record in records if tag_of(record) == tag]
        by_tag[tag] = bootstrap_mean([value_of(record, name) for record in rows], _clusters(rows))
    overall = bootstrap_mean(values, clusters, strata)
    return Measure(part, name, overall, len(records), _scorer(name, records), by_tag)


def _compared(part: str, name: str, first: list[Record], second: list[Record]) -> Comparison | None:
    theirs = {record.key: record for record in second}
    ours = [record for record in first if record.key in theirs]
    if not ours:
        return None
    others = [theirs[record.key] for record in ours]
    scorers = (_scorer(name, ours), _scorer(name, others))
    difference = None
    if scorers[0] == scorers[1]:
        values = [[value_of(record, name) for record in rows] for rows in (ours, others)]
        difference = paired_bootstrap(values[0], values[1], _clusters(ours), _strata(name, ours))
    means = [_measure(part, name, rows).interval.value for rows in (ours, others)]
    return Comparison(part, name, means[0], means[1], len(ours), scorers, difference)


def _clusters(records: Iterable[Record]) -> list[str]:
    """Return each record's cluster, within its tag: an image with questions of two tags is one cluster in each.

    The tag is part of the name because a cluster must not span two strata.
    """
    return [json.dumps([tag_of(record), record.inputs.get("cluster", record.item)]) for record in records]


def _strata(name: str, records: Sequence[Record]) -> list[str] | None:
    tags = [tag_of(record) for record in records]
    return tags if name in SHARES and len(set(tags)) > 1 else None


def _scorer(name: str, records: Iterable[Record]) -> str:
    """Return the scorer of the verdicts; all of them if several were mixed."""
    if name != VERDICT:
        return ""
    return " and ".join(dict.fromkeys(described(record.scorer) for record in records if record.scorer))

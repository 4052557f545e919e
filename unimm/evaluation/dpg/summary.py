"""Summary of a DPG-Bench run, computed from its records only."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from unimm.errors import UserError
from unimm.evaluation.dpg.prompts import Rows
from unimm.evaluation.dpg.rules import COMPAT, FIXED, PLAIN, Rule, read_questions, summarize
from unimm.evaluation.metrics.bootstrap import bootstrap_mean
from unimm.evaluation.runs.records import Record, unreadable_names


def summarize_records(records: Sequence[Record]) -> dict[str, Any]:
    """Return `official-compat`, `fixed` and `plain`, each with `dpg`, its interval (resampling prompts), categories,
    dropped prompts, and the number of `unparsed` answers: neither yes nor no by the rule, or guessed by the VQA model.

    Raises:
        UserError: the records come from more than one VQA model.
    """
    if len(scorers := {json.dumps(record.scorer, sort_keys=True) for record in records}) > 1:
        raise UserError(f"These records come from {len(scorers)} scorers, which have no common scale: one run each.")
    counted: dict[str, Any] = {"images": len(records), "prompts": len({record.item for record in records})}
    counted["unreadable"] = unreadable_names(records)
    if not any(record.raw_scores for record in records):
        return counted
    rows = {row["row"]: row for record in records for row in record.inputs["rows"]}
    ordered = [rows[index] for index in sorted(rows)]
    figures = {rule.name: _figures(ordered, records, rule) for rule in (COMPAT, FIXED, PLAIN)}
    return counted | {"scorer": records[0].scorer} | figures


def table(summary: Mapping[str, Any]) -> str:
    """Format the summary: the VQA model, then the three rules side by side."""
    if FIXED.name not in summary:
        return f"{summary['images']} images of {summary['prompts']} prompts"
    rules, scorer = [summary[rule.name] for rule in (COMPAT, FIXED, PLAIN)], summary["scorer"]
    lost = summary["unreadable"]
    lines = [f"{len(lost)} images cannot be read, of {', '.join(dict.fromkeys(lost))}"] if lost else []
    lines += [f"scorer {scorer['name']} ({scorer['kind']}, {scorer['version']}, sha256 {scorer['sha256'][:12]})"]
    lines += [f"{'':<28}" + "".join(f"{rule.name:>16}" for rule in (COMPAT, FIXED, PLAIN))]
    lines += [f"{'DPG':<28}" + "".join(_two_digits(each["dpg"]) for each in rules)]
    for count in ("prompts", "unparsed"):
        lines += [f"{count:<28}" + "".join(f"{each[count]:>16}" for each in rules)]
    for level in ("level1", "categories"):
        for name in summary[FIXED.name][level]:
            lines += [f"{name:<28}" + "".join(_two_digits(each[level].get(name)) for each in rules)]
    return "\n".join(lines)


def _two_digits(value: float | None) -> str:
    return f"{'-' if value is None else format(value, '.2f'):>16}"


def _answers(records: Sequence[Record], rule: Rule) -> tuple[dict[str, list[dict[int, str]]], int]:
    """Return the answers about every image of each prompt, and how many of them are unparsed. A guessed answer counts
    for the other rules, but is empty for `PLAIN`."""
    answers, unparsed = dict[str, list[dict[int, str]]](), 0
    for record in sorted(records, key=lambda record: record.key):
        given, guessed = record.raw_scores["answers"], record.raw_scores.get("guessed", [])
        unparsed += sum(number in guessed or not rule.is_parsed(answer) for number, answer in given.items())
        kept = {int(n): "" if rule is PLAIN and n in guessed else answer for n, answer in given.items()}
        answers.setdefault(record.item, []).append(kept)
    return answers, unparsed


def _figures(rows: Rows, records: Sequence[Record], rule: Rule) -> dict[str, Any]:
    answers, unparsed = _answers(records, rule)
    # The records may cover only some prompts, but COMPAT skips a row only if it is the first of the whole file.
    questions = read_questions(rows, rule, first_row=rows[0]["row"])
    lost = [item for item in answers if item not in questions]  # its only question stood in the first row
    figures = summarize(questions, {item: each for item, each in answers.items() if item not in lost}, rule)
    scores = figures.pop("scores")
    figures["interval"] = None
    if scores:
        interval = bootstrap_mean([100 * score for score in scores.values()], list(scores))
        figures["interval"] = {"low": interval.low, "high": interval.high}
    return figures | {"dropped": figures["dropped"] + lost, "unparsed": unparsed}

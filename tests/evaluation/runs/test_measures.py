"""Scores and differences from records, against the bootstrap called by hand."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from unimm.evaluation.geneval.rules import failed_rule
from unimm.evaluation.metrics.bootstrap import bootstrap_mean, paired_bootstrap
from unimm.evaluation.runs.measures import compare, described, measures
from unimm.evaluation.runs.records import Record

SCORER = {"name": "detector", "version": "2", "sha256": "ab" * 32, "precision": "float32"}


def drawn(right: Callable[[int], bool], scorer: dict | None = None) -> list[Record]:
    """Two tags of 5 and 10 prompts, 4 images each; and one part without verdicts."""
    rows = []
    for number in range(15):
        inputs = {"part": "drawing", "tag": "counting" if number < 5 else "colors"}
        for k in range(4):
            verdict = right(4 * number + k)
            rows.append(Record("toy", f"d{number:02}", k, inputs=inputs, verdict=verdict, scorer=scorer or SCORER))
    return rows + [Record("toy", f"p{n}", inputs={"part": "copies"}, raw_scores={"psnr": 20.0 + n}) for n in range(9)]


def by_coin(seed: int) -> Callable[[int], bool]:
    coins = np.random.default_rng(seed).random(60) < 0.6
    return lambda index: bool(coins[index])


def test_scores_are_clustered_by_item_within_tags() -> None:
    rows = drawn(by_coin(0))
    verdicts, psnr = measures(rows)
    values = [float(row.verdict) for row in rows if row.verdict is not None]
    items, tags = [row.item for row in rows[:60]], [row.inputs["tag"] for row in rows[:60]]
    assert (verdicts.part, verdicts.name, verdicts.samples) == ("drawing", "correct", 60)
    assert verdicts.interval == bootstrap_mean(values, items, tags)
    assert verdicts.interval.value == pytest.approx((np.mean(values[:20]) + np.mean(values[20:])) / 2)
    assert verdicts.interval.clusters == 15
    assert verdicts.by_tag["counting"] == bootstrap_mean(values[:20], items[:20])
    assert verdicts.scorer == "detector, 2, precision float32, sha256 abababababab"
    assert (psnr.part, psnr.name, psnr.interval.value, psnr.scorer) == ("copies", "psnr", 24.0, "")


@pytest.mark.parametrize("name", ["plain", "strict"])
def test_a_second_reading_is_averaged_as_the_verdict_is(name: str) -> None:
    """Within the tags and then over them, whether it is kept as a truth value or as a number."""
    coin = by_coin(0)
    rows = [replace(row, raw_scores={name: row.verdict if n % 2 else float(row.verdict or 0)}) for n, row in
            enumerate(drawn(coin)[:60])]  # fmt: skip
    verdicts, second = measures(rows)
    assert (second.name, second.interval, second.by_tag) == (name, verdicts.interval, verdicts.by_tag)


def test_a_cluster_may_be_wider_than_an_item() -> None:
    """Six questions about one image, as in POPE."""
    coin = by_coin(1)
    rows = [Record("toy", f"q{n:02}", inputs={"cluster": n // 6}, verdict=coin(n)) for n in range(60)]
    (score,) = measures(rows)
    assert score.interval == bootstrap_mean([coin(n) for n in range(60)], [n // 6 for n in range(60)])
    assert score.interval.clusters == 10 and not score.by_tag


def test_two_runs_are_compared_in_pairs() -> None:
    first, second = drawn(by_coin(0)), drawn(by_coin(0))
    assert all(row.difference is not None and row.difference.value == 0 for row in compare(first, second))
    second = drawn(by_coin(2))[:-1]
    verdicts, psnr = compare(first, second)
    values = [[float(row.verdict or 0) for row in rows[:60]] for rows in (first, second)]
    items, tags = [row.item for row in first[:60]], [row.inputs["tag"] for row in first[:60]]
    assert verdicts.difference == paired_bootstrap(*values, items, tags)
    assert verdicts.second - verdicts.first == pytest.approx(verdicts.difference.value)
    assert psnr.samples == 8 and psnr.first == psnr.second == 23.5


def test_a_judge_of_several_parts_in_a_few_words() -> None:
    parts = {"detector": {"name": "finder", "sha256": "a" * 64}, "thresholds": {"threshold": 0.3, "max_objects": 16}}
    assert described({"name": "geneval-hf", **parts}) == (
        "geneval-hf, detector (finder, sha256 aaaaaaaaaaaa), thresholds (threshold 0.3, max_objects 16)"
    )


def test_verdicts_of_two_judges_are_not_compared() -> None:
    verdicts, psnr = compare(drawn(by_coin(0)), drawn(by_coin(0), scorer={"name": "another"}))
    assert verdicts.difference is None and verdicts.scorers[1] == "another"
    assert psnr.difference is not None


@pytest.mark.parametrize(
    ("reason", "rule"),
    [
        ("expected dog>=2, found 1", "too few"),
        ("expected dog<3, found 4", "too many"),
        ("expected red dog>=1, found 0 red; and 1 blue", "color"),
        ("expected dog left of target, found right of and below target", "position"),
        ("expected dog left of target, found  target", "position"),
        ("no target for dog to be left of", "position"),
        ("the answer is no", None),
    ],
)
def test_rules_are_read_from_their_reasons(reason: str, rule: str | None) -> None:
    assert failed_rule(reason) == rule

"""TextVQA's score against verdicts recorded from lmms-eval 0.7.3."""

import json

import pytest

from tests.conftest import ROOT
from unimm.evaluation.understanding.textvqa import plain_accuracy, process, soft_accuracy

CASES = json.loads((ROOT / "tests/fixtures/answer_parsing_cases.json").read_text())["textvqa"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['pred']}-{case['score']}")
def test_recorded_scores(case):
    assert soft_accuracy(case["pred"], case["answers"]) == pytest.approx(case["score"])


@pytest.mark.parametrize(
    ("answer", "processed"),
    [
        ("The Stop sign.", "stop sign"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("somebody'd", "somebodyd"),
        ("None", "0"),
        ("ten", "10"),
        ("7-up", "7 up"),
        ("- 7-up", "7up"),
        ("joe's", "joe 's"),
        ("3.5 oz.", "3.5 oz"),
        ("12,000", "12000"),
        ("a\nb\tan", "b"),
    ],
)
def test_processing(answer, processed):
    assert process(answer) == processed


def test_no_annotators_are_an_error():
    with pytest.raises(ValueError, match="there are none"):
        soft_accuracy("a", [])


def test_the_plain_accuracy_has_no_quirks_and_nothing_for_an_empty_answer():
    assert soft_accuracy("the", ["a"] * 10) == 1.0  # nothing is left of either
    assert plain_accuracy("the", ["a"] * 10) == 0.0
    assert plain_accuracy("", ["?"] * 10) == 0.0
    assert soft_accuracy("none", ["0"] * 10) == 1.0
    assert plain_accuracy("none", ["0"] * 10) == 0.0
    assert plain_accuracy("Two!", ["2"] * 10) == plain_accuracy("stop sign", ["the stop sign"] * 10) == 1.0
    assert plain_accuracy("b", ["b", "b", *["c"] * 8]) == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)

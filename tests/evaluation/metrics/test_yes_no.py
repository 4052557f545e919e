"""Readings of yes and no against recorded verdicts of the tools that they follow; scores against counts by hand."""

import json
from typing import Any

import pytest

from tests.conftest import ROOT
from unimm.errors import UserError
from unimm.evaluation.metrics.yes_no import (
    binary_scores,
    mme_reading,
    mme_scores,
    official_reading,
    plain_reading,
    pope_scores,
    strict_reading,
    unparsed,
)

CASES = json.loads((ROOT / "tests/fixtures/answer_parsing_cases.json").read_text())["yes_no"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: repr(case["text"]))
def test_readings_are_those_of_the_tools(case: dict[str, str]) -> None:
    text = case["text"]
    assert mme_reading(text) == case["mme_lmms_eval"]
    recorded = case["pope_lmms_eval"]
    assert strict_reading(text) == (recorded if recorded in ("yes", "no") else "other")
    assert official_reading(text) == case["pope_official"]


@pytest.mark.parametrize(
    ("text", "reading"),
    [
        ("Yes.", "yes"),
        ("**NO**", "no"),
        ("The answer is yes, not no", "yes"),
        ("There is no dog", "no"),
        ("_yes_", "yes"),
        ("not at all", "other"),
        ("nothing", "other"),
        ("yesterday", "other"),
        ("", "other"),
    ],
)
def test_the_plain_reading_takes_the_first_word(text: str, reading: str) -> None:
    assert plain_reading(text) == reading


def rows(*answers: str, expected: str, **fields: Any) -> list[dict[str, Any]]:
    return [{"answer": answer, "expected": expected, **fields} for answer in answers]


def test_binary_scores_by_hand() -> None:
    asked = rows("yes", "yes", "no", "maybe", expected="yes") + rows("yes", "no", "no", "hm", expected="no")
    found = binary_scores(asked)
    assert found == {
        "accuracy": 4 / 8,
        "precision": 2 / 3,
        "recall": 2 / 4,  # "maybe" is a miss
        "f1": pytest.approx(4 / 7),
        "yes_ratio": 3 / 8,
        "unparsed": 2,
    }
    assert binary_scores(asked, forgiving=True)["recall"] == 2 / 3


@pytest.mark.parametrize("answer", ["", "red", "who knows", "yesterday", "NO", "n", "no\n"])
def test_a_yes_that_nobody_wrote_is_unparsed_for_the_official_reading(answer: str) -> None:
    """POPE's script takes each of them for a yes, because it finds no "no"; the figures stay its own."""
    scores = pope_scores(rows(answer, "yes", expected="yes", category="random"))
    assert official_reading(answer) == "yes"
    official, plain = scores["official"]["pooled"], scores["plain"]["pooled"]
    assert (official["accuracy"], official["unparsed"]) == (1.0, 1)
    assert plain["accuracy"] == 0.5
    assert plain["unparsed"] == (answer not in ("NO", "no\n"))


def test_a_no_out_of_other_words_is_unparsed_for_mme() -> None:
    answers = {
        "Noise": True,
        "Not sure": True,
        "no.": False,
        "y": False,
        "No, none": False,
        "who knows": True,
        "o": True,
    }
    for answer, lost in answers.items():
        assert unparsed(answer, mme_reading) == lost, answer
    pair = rows("Noise", "Not sure", expected="no", category="existence", question_id="1")
    found = mme_scores(pair)
    assert (found["perception"], found["unparsed"]) == (200.0, 2)
    assert (found["plain"]["perception"], found["plain"]["unparsed"]) == (0.0, 2)


def test_nothing_but_no_scores_zero_and_does_not_divide_by_it() -> None:
    found = binary_scores(rows("no", "no", expected="yes"))
    assert (found["precision"], found["recall"], found["f1"]) == (0.0, 0.0, 0.0)


def test_pope_by_split_and_by_reading() -> None:
    asked = rows("Yes.", "yes", expected="yes", category="random") + rows("no", expected="no", category="random")
    asked += rows("No, there is none", expected="no", category="popular")
    asked += rows("NO", expected="yes", category="popular")
    found = pope_scores(asked)
    assert found["lmms_eval"]["random"]["accuracy"] == 2 / 3  # "Yes." is wrong
    assert found["lmms_eval"]["random"]["recall"] == 1.0  # and yet no miss
    assert found["official"]["random"]["f1"] == 1.0
    assert found["official"]["popular"]["accuracy"] == 1.0  # "NO" counts as a yes
    assert found["plain"]["popular"]["accuracy"] == 1 / 2
    assert found["official"]["mean_f1"] == 1.0
    assert found["plain"]["mean_f1"] == (1.0 + 0.0) / 2 and found["plain"]["pooled"]["accuracy"] == 4 / 5


def test_mme_adds_accuracy_and_the_share_of_images_with_both() -> None:
    asked = []
    for name, answers in {"a": ("yes", "no"), "b": ("yes", "yes"), "c": ("hm", "no")}.items():
        for answer, expected in zip(answers, ("yes", "no"), strict=True):
            asked += rows(answer, expected=expected, category="existence", question_id=name)
    asked += rows("yes", expected="yes", category="code_reasoning", question_id="d")
    asked += rows("no", expected="yes", category="code_reasoning", question_id="d")
    found = mme_scores(asked)
    assert found["categories"]["existence"]["acc"] == pytest.approx(100 * 4 / 6)
    assert found["categories"]["existence"]["acc_plus"] == pytest.approx(100 / 3)
    assert found["perception"] == pytest.approx(100 * 4 / 6 + 100 / 3)
    assert found["cognition"] == 50.0 and found["unparsed"] == 1


def test_mme_refuses_half_a_image_and_unknown_categories() -> None:
    with pytest.raises(UserError, match="asks 2 questions about each image, a has 1"):
        mme_scores(rows("yes", expected="yes", category="count", question_id="a"))
    with pytest.raises(UserError, match="no category 'colour'"):
        mme_scores(rows("yes", "no", expected="yes", category="colour", question_id="a"))

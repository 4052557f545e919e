"""Scores of the multiple-choice benchmarks against recorded verdicts and counts by hand."""

import json
from typing import Any

import pytest

from tests.conftest import ROOT
from unimm.errors import UserError
from unimm.evaluation.understanding.rules import (
    RULES,
    choice_fields,
    exact_scores,
    first_letter,
    letter_scores,
    mmbench_scores,
    mmmu_choice,
    mmmu_scores,
    same_text,
    seed_scores,
)

FIXTURES = json.loads((ROOT / "tests/fixtures/answer_parsing_cases.json").read_text())
MMMU, SEED = FIXTURES["mmmu_multi_choice"], FIXTURES["seed_first_char"]


@pytest.mark.parametrize("case", MMMU["cases"], ids=lambda case: repr(case["text"]))
def test_mmmu_letters_are_those_of_its_tool_and_a_random_choice_is_none(case: dict[str, str]) -> None:
    recorded = None if case["pred"] == "RANDOM" else case["pred"]
    assert mmmu_choice(case["text"], MMMU["index2ans"]) == recorded


def test_mmmu_takes_the_option_that_is_named_last() -> None:
    assert mmmu_choice("it may be 1 cm but then rather 4 cm or so", MMMU["index2ans"]) == "D"
    assert mmmu_choice("(D) and (B) and (A)?", MMMU["index2ans"]) == "A"


def test_mmmu_counts_what_it_cannot_read() -> None:
    rows = [
        {"id": "validation_Art_Theory_1", "correct": True, "options": None, "unparsed": True, "plain_correct": None},
        {"id": "validation_Art_Theory_2", "correct": False, "options": 4, "unparsed": True, "plain_correct": None},
        {"id": "validation_Math_30", "correct": False, "options": None, "unparsed": False, "plain_correct": True},
        {"id": "validation_Math_31", "correct": False, "options": 2, "unparsed": True, "plain_correct": False},
    ]
    assert mmmu_scores(rows) == {
        "accuracy": 1 / 4,
        "expected": (1 + 1 / 4 + 0 + 1 / 2) / 4,
        "subjects": {"Art_Theory": 1 / 2, "Math": 0.0},
        "unparsed": 3,  # the first one was right by a guess
        "plain": {"accuracy": 1 / 4, "unparsed": 2},
    }


@pytest.mark.parametrize("case", SEED["cases"], ids=lambda case: repr(case["text"]))
def test_seed_reads_the_first_character(case: dict[str, str]) -> None:
    assert first_letter(case["text"]) == case["pred"].upper()


TEXTS = {"A": "a cat", "B": "a dog", "C": "a ring", "D": "two rings"}


def seed_row(answer: str, expected: str, data_type: str = "image") -> dict[str, Any]:
    letter = first_letter(answer)
    fields = choice_fields(answer, letter if letter in TEXTS else None, TEXTS)
    return {"answer": answer, "expected": expected, "data_type": data_type, **fields}


def test_seed_by_kind() -> None:
    rows = [seed_row("b", "B"), seed_row("(A)", "A"), seed_row("D. ring", "D", "video")]
    plain = {"image": 1.0, "video": 1.0, "all": 1.0, "unparsed": 0}
    assert seed_scores(rows) == {"image": 1 / 2, "video": 1.0, "all": 2 / 3, "unparsed": 1, "plain": plain}


def test_seed_counts_the_first_letter_of_a_word_as_a_guess() -> None:
    """All four are right for SEED's rule; two of them by accident."""
    rows = [seed_row(answer, "B") for answer in ("B", "b.", "Because it barks", "Blue")]
    found = seed_scores(rows)
    assert (found["all"], found["unparsed"]) == (1.0, 2)
    assert (found["plain"]["all"], found["plain"]["unparsed"]) == (1 / 2, 2)
    assert [RULES["seed"].unparsed(row) for row in rows] == [False, False, True, True]
    assert [RULES["seed"].plain(row) for row in rows] == [True, True, False, False]
    quantifier = seed_row("A dog barks", "A")
    assert RULES["seed"].verdict(quantifier) and RULES["seed"].unparsed(quantifier)
    assert not RULES["seed"].plain(quantifier)  # it names option B


def rotation(index: int, choice: str | None, expected: str, category: str = "shape") -> dict[str, Any]:
    row = {"index": index, "choice": choice, "expected": expected, "category": category, "l2": "fine"}
    return row | {"plain_choice": choice, "guessed": False}


def test_mmbench_counts_a_question_when_every_rotation_is_right() -> None:
    rows = [
        rotation(3, "A", "A"),
        rotation(1_000_003, "B", "B"),
        rotation(5, "A", "A", "place"),
        rotation(1_000_005, None, "B", "place"),
        rotation(2_000_005, "C", "C", "place"),
    ]
    found = mmbench_scores(rows)
    assert (found["circular"], found["per_row"], found["unparsed"]) == (50.0, 80.0, 1)
    assert found["category"] == {"place": 0.0, "shape": 100.0} and found["l2"] == {"fine": 50.0}
    with pytest.raises(UserError, match="question 5 is there in rotations only"):
        mmbench_scores(rows[:2] + rows[3:])


def test_mmbench_counts_letters_out_of_words_as_guesses() -> None:
    """The tool finds A in "DNA is it" and no letter in "unclear": two groups of one rotation."""
    rows = [
        {**rotation(1, "A", "A"), **choice_fields("DNA is it", "A", TEXTS)},
        {**rotation(2, None, "B"), **choice_fields("unclear", None, TEXTS)},
        {**rotation(3, "C", "C"), **choice_fields("(C)", "C", TEXTS)},
        {**rotation(4, "D", "C"), **choice_fields("(D), not (C)", "D", TEXTS)},
    ]
    found = mmbench_scores(rows)
    assert (found["circular"], found["unparsed"]) == (50.0, 2)
    plain = found["plain"]
    assert (plain["circular"], plain["per_row"], plain["unparsed"]) == (25.0, 25.0, 3)


def test_comparisons_of_whole_answers_count_what_they_leave_nothing_of() -> None:
    rows = [
        {"score": 1.0, "plain_score": 1.0, "unparsed": False},
        {"score": 1.0, "plain_score": 0.0, "unparsed": True},  # "?" against "the" in TextVQA
    ]
    assert exact_scores(rows) == {"accuracy": 1.0, "unparsed": 1, "plain": {"accuracy": 0.5, "unparsed": 1}}
    letters = [
        {"score": 0.0, "plain_choice": "B", "expected": "B", "unparsed": True},  # "The answer is B"
        {"score": 0.0, "plain_choice": None, "expected": "B", "unparsed": True},
        {"score": 1.0, "plain_choice": "A", "expected": "A", "unparsed": False},
    ]
    found = letter_scores(letters)
    assert found == {"accuracy": 1 / 3, "unparsed": 2, "plain": {"accuracy": 2 / 3, "unparsed": 1}}


def test_exact_matches_ignore_case_and_punctuation_and_nothing_else() -> None:
    assert same_text("Two-fold!", "twofold") and not same_text("two fold", "twofold")
    assert same_text("B.", "b") and not same_text("the b", "b")


def test_every_rule_counts_its_rows_and_clusters_what_belongs_together() -> None:
    assert RULES["mme"].cluster({"question_id": "a"}) == "a"
    assert RULES["pope"].cluster({"image": "i"}) == "i"
    assert RULES["mmbench"].cluster({"index": 2_000_007}) == 7
    assert RULES["gqa"].cluster({"item": "000001"}) == "000001"
    verdicts = {
        "mme": {"answer": "Yes", "expected": "yes"},
        "pope": {"answer": "No, there is none", "expected": "no"},
        "mmbench": {"choice": "A", "expected": "A"},
        "seed": {"answer": "c) ring", "expected": "C"},
        "mmmu": {"correct": True},
        "ai2d": {"score": 1.0},
    }
    for name, row in verdicts.items():
        assert RULES[name].verdict(row) == 1, name

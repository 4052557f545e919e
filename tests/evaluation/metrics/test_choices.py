"""Which option an answer names: what is written counts, what would have to be guessed does not."""

import pytest

from unimm.evaluation.metrics.choices import had_to_guess, plain_choice
from unimm.evaluation.metrics.open_answers import accepted_answers, plain_open

OPTIONS = {"A": "a cat", "B": "cat food", "C": "3 cm", "D": "red"}


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("b", "B"),
        ("(B)", "B"),
        ("**B**", "B"),
        ("B. dog", "B"),
        ("B) dog", "B"),
        ("I think B", "B"),
        ("The answer is (C) not (D)", "C"),
        ("The correct answer is: A because it purrs", "A"),
        ("Answer: b.", "B"),
        ("A is right", "A"),
        ("cat food", "B"),
        ("It is a cat.", "A"),
        ("3 CM.", "C"),
        ("It is the Red one", "D"),
        # nothing is named, or more than one
        ("", None),
        ("Because it is so", None),
        ("DNA is it", None),
        ("A dog is there", None),
        ("I think so", None),
        ("the answer is Bread", None),
        ("A or B", None),
        ("red or 3 cm", None),
        ("reddish", None),
        ("E", None),
    ],
)
def test_the_plain_reading_of_a_choice(answer: str, letter: str | None) -> None:
    assert plain_choice(answer, OPTIONS) == letter


@pytest.mark.parametrize(
    ("letter", "answer", "guessed"),
    [
        ("A", "DNA is it", True),
        ("B", "Because", True),
        ("B", "the answer is Bread", True),
        ("A", "A dog", True),
        ("B", "(B)", False),
        ("D", "(C), then (D)", False),  # the last one named: a rule, not a guess
        ("D", "it is red", False),
        (None, "hm", False),
    ],
)
def test_a_letter_that_is_not_written_was_guessed(letter: str | None, answer: str, guessed: bool) -> None:
    assert had_to_guess(letter, answer, OPTIONS) == guessed


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        ("cat", "cat", True),
        ("The cat.", "cat", True),
        ("category", "cat", False),  # right for MMMU's own tool
        ("two", "2", True),
        ("It is 9 cm", "9", True),
        ("9.0", "9", True),
        ("1,200 people", "1200", True),
        ("between 1 and 9", "9", None),  # right for MMMU's own tool
        ("nothing", "9", False),
        ("", "9", None),
        ("5", "['5', 'five']", True),
        ("five", "['5', 'five']", True),
        ("v2", "2", False),
    ],
)
def test_the_plain_reading_of_an_open_answer(answer: str, expected: str, right: bool | None) -> None:
    assert plain_open(answer, expected) is right


def test_a_list_of_answers_that_is_none_is_a_text() -> None:
    assert accepted_answers("[open") == ["[open"]

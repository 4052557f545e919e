"""What counts as the same short answer."""

import pytest

from unimm.evaluation.metrics.answers import normalize, same_answer


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("yes", "yes"),
        ("Yes.", "yes"),
        ("  NO!\n", "no"),
        ("two", "2"),
        ("2.", "two"),
        ("Left  of", "left of"),
        ("the left of", "left of"),
        ("**red**", "red"),
        ("A red circle and a blue ring.", "a red circle and a blue ring"),
    ],
)
def test_form_does_not_matter(answer: str, expected: str) -> None:
    assert same_answer(answer, expected)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("", "yes"),
        ("", ""),
        (".", "yes"),
        ("yes no", "yes"),
        ("no, there is none", "no"),
        ("left", "left of"),
        ("three", "two"),
        ("12", "2"),
        ("reddish", "red"),
    ],
)
def test_content_does(answer: str, expected: str) -> None:
    assert not same_answer(answer, expected)


def test_normalize() -> None:
    assert normalize("The Answer, is:  'TWO'!") == "answer is 2"

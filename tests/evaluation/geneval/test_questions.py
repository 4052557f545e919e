"""Questions that follow from the metadata, answers read or refused, and two judges side by side."""

import pytest

from unimm.evaluation.geneval.prompts import official_prompts
from unimm.evaluation.geneval.questions import (
    Question,
    agreement,
    mean_score,
    questions,
    read_answer,
    score_answers,
)

BY_PROMPT = {prompt["prompt"]: prompt for prompt in official_prompts()}


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a photo of an elephant", [("existence", "Is there an elephant in the picture?", "yes")]),
        ("a photo of two clocks", [("count", "How many clocks are in the picture?", "2")]),
        (
            "a photo of a blue elephant",
            [
                ("existence", "Is there an elephant in the picture?", "yes"),
                ("color", "What color is the elephant?", "blue"),
            ],
        ),
        (
            "a photo of a dog right of a teddy bear",
            [
                ("existence", "Is there a teddy bear in the picture?", "yes"),
                ("existence", "Is there a dog in the picture?", "yes"),
                ("position", "Is the dog to the right of the teddy bear?", "yes"),
            ],
        ),
    ],
)
def test_questions_of_a_prompt(prompt: str, expected: list[tuple[str, str, str]]) -> None:
    assert [tuple(question) for question in questions(BY_PROMPT[prompt])] == expected


def test_every_prompt_has_its_questions() -> None:
    counts = {"single_object": 1, "two_object": 2, "counting": 1, "colors": 2, "position": 3, "color_attr": 4}
    for prompt in official_prompts():
        asked = questions(prompt)
        assert len(asked) == counts[prompt["tag"]]
        assert score_answers(asked, [question.expected for question in asked]).correct


@pytest.mark.parametrize(
    ("kind", "answer", "read"),
    [
        ("existence", "Yes.", "yes"),
        ("existence", "no, there is none", "no"),
        ("position", "yes", "yes"),
        ("existence", "There is a dog", None),
        ("existence", "", None),
        ("count", "2", "2"),
        ("count", "There are three clocks.", "3"),
        ("count", "two or three", None),
        ("count", "many", None),
        ("color", "The elephant is blue", "blue"),
        ("color", "Gray", "gray"),
        ("color", "black and white", None),
        ("color", "striped", None),
    ],
)
def test_answers_are_read_or_refused(kind: str, answer: str, read: str | None) -> None:
    assert read_answer(kind, answer) == read


def test_one_wrong_answer_is_a_wrong_image() -> None:
    asked = questions(BY_PROMPT["a photo of a blue elephant"])
    assert score_answers(asked, ["Yes", "blue"]) == (True, 1.0, [], ["yes", "blue"])
    scored = score_answers(asked, ["Yes", "red"])
    assert (scored.correct, scored.score) == (False, 0.5)
    assert scored.reasons == ["What color is the elephant? expected blue, answered red"]
    scored = score_answers(asked, ["maybe", "blue"])
    assert scored.reasons == ["unparsed answer to 'Is there an elephant in the picture?': 'maybe'"]
    with pytest.raises(ValueError, match="shorter"):
        score_answers([Question("existence", "Is it?", "yes")], [])


def test_two_judges_are_compared_image_by_image() -> None:
    first = {(0, 0): True, (0, 1): False, (1, 0): True, (2, 0): False}
    second = {(0, 0): True, (0, 1): True, (1, 0): False, (2, 0): False}
    found = agreement(first, second)
    assert found == (1, 1, [(1, 0)], [(0, 1)])
    assert found.rate == 0.5
    with pytest.raises(ValueError, match="4 and 1 images"):
        agreement(first, {(0, 0): True})


def test_scores_are_means_over_images() -> None:
    rows = [{"tag": "colors", "score": 0.5}, {"tag": "colors", "score": 1.0}, {"tag": "counting", "score": 0.0}]
    assert mean_score(rows) == {"colors": 0.75, "counting": 0.0}

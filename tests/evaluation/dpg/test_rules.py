"""DPG-Bench's scoring against verdicts recorded from the published script, and what each of its rules is worth."""

import json
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.evaluation.mutations import mutated
from unimm.errors import UserError
from unimm.evaluation.dpg import rules as dpg
from unimm.evaluation.dpg.rules import COMPAT, FIXED, PLAIN, read_questions, score_image, summarize

RECORDED = json.loads((ROOT / "tests/fixtures/dpg_synthetic_cases.json").read_text())
ROWS, CASES = RECORDED["csv_rows"], RECORDED["cases"]


def answers_of(case: dict[str, Any]) -> list[dict[int, str]]:
    return [{int(number): answer for number, answer in image.items()} for image in case["answers"]]


def agrees(module: Any, case: dict[str, Any]) -> bool:
    """Whether the scoring of `module` gives what the published script gave."""
    questions = module.read_questions(ROWS, module.COMPAT)[case["item_id"]]
    official = case["official"]
    try:
        images = module.score_prompt(questions, answers_of(case), module.COMPAT)
    except KeyError as error:
        return official == {"error": "KeyError", "message": str(error)}
    found = [[name, raw] for name, raw, _ in module.category_answers(questions, images, module.COMPAT)]
    scores = [image.score for image in images]
    return (
        "error" not in official
        and scores == pytest.approx(official["crop_scores"])
        and sum(scores) / len(scores) == pytest.approx(official["image_score"])
        and found == official["category_scores"]
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["item_id"])
def test_every_recorded_verdict(case):
    assert agrees(dpg, case)


@pytest.mark.parametrize(
    ("line", "changed", "broken"),
    [
        ("any(kept[parent] == 0", "any(raw[parent] == 0", 6),
        ("lambda answer: answer, every", "normalize, every", 11),
        ("(q.category, score.raw[q.number]", "(q.category, score.kept[q.number]", 9),
        ('Rule("official-compat", True', 'Rule("official-compat", False', 1),
        ("if any(kept[parent] == 0", "if all(kept[parent] == 0", 13),
        ("scores if rule.every_image else scores[-1:]", "scores", 13),
        ("float(np.mean(list(kept.values())))", "float(np.mean(list(raw.values())))", 11),
    ],
    ids=[
        "zero from raw",
        "lenient yes",
        "zeroed categories",
        "no row skip",
        "every parent",
        "categories of all images",
        "score of raw answers",
    ],
)
def test_every_rule_is_needed(line, changed, broken):
    module = mutated(dpg, line, changed)
    assert sum(not agrees(module, case) for case in CASES) == broken


def test_the_compatible_summary_drops_what_the_script_drops():
    answers = {case["item_id"]: answers_of(case) for case in CASES}
    found = summarize(read_questions(ROWS, COMPAT), answers, COMPAT)
    official = [case["official"] for case in CASES if "error" not in case["official"]]
    assert found["dropped"] == ["synthetic00"] and found["prompts"] == len(official) == 13
    assert found["dpg"] == pytest.approx(100 * sum(each["image_score"] for each in official) / 13)
    pooled = [pair for each in official for pair in each["category_scores"]]
    for name, value in found["categories"].items():
        own = [score for category, score in pooled if category == name]
        assert value == pytest.approx(100 * sum(own) / len(own))
    entity = [score for category, score in pooled if category.startswith("entity")]
    assert found["level1"]["entity"] == pytest.approx(100 * sum(entity) / len(entity))


def test_the_fixed_summary_loses_nothing():
    answers = {case["item_id"]: answers_of(case) for case in CASES}
    questions = read_questions(ROWS)
    found = summarize(questions, answers)
    assert found["prompts"] == 14 and found["dropped"] == []
    assert len(questions["synthetic00"]) == 8
    raw = {name: [] for name in found["categories"]}
    for case in CASES:
        for image in answers_of(case):
            for question in questions[case["item_id"]]:
                raw[question.category].append(image[question.number].lower().strip(".") == "yes")
    for name, values in raw.items():
        assert found["categories"][name] == pytest.approx(100 * sum(values) / len(values))
        assert found["categories_kept"][name] <= found["categories"][name]


def test_answers_that_differ_in_form_count_by_the_fixed_rule_only():
    questions = read_questions([row for row in ROWS if row["item_id"] == "synthetic03"])["synthetic03"]
    answers = {question.number: "Yes." for question in questions}
    assert score_image(questions, answers, FIXED).score == 1
    assert score_image(questions, answers, COMPAT).score == 0
    verbose = dict.fromkeys(answers, "Yes, there is one")
    scores = [score_image(questions, verbose, rule).score for rule in (COMPAT, FIXED, PLAIN)]
    assert scores == [0, 0, 1]


def test_a_no_because_nothing_was_found_is_unparsed():
    said = ["yes", "no", "Yes.", "Yes, one", "maybe", ""]
    parsed = {rule.name: [rule.is_parsed(answer) for answer in said] for rule in (COMPAT, FIXED, PLAIN)}
    assert parsed["official-compat"] == [True, True, False, False, False, False]
    assert parsed["fixed"] == [True, True, True, False, False, False]
    assert parsed["plain"] == [True, True, True, True, False, False]


def test_bad_question_files():
    row = {name: ROWS[1][name] for name in dpg.COLUMNS}
    with pytest.raises(UserError, match="Row 1 of the question file has no tuple"):
        read_questions([{**row, "tuple": None}])
    with pytest.raises(UserError, match="Row 1 of the question file has no readable numbers"):
        read_questions([{**row, "dependency": "none"}])
    with pytest.raises(UserError, match="Question 2 of the prompt synthetic00 depends on 3, which it lacks"):
        read_questions([row])
    with pytest.raises(UserError, match="2 questions under 1 numbers"):
        read_questions([row, row])
    with pytest.raises(UserError, match="no questions about the prompt 7"):
        summarize(read_questions(ROWS), {"7": [{}]})

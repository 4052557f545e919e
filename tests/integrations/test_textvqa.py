"""TextVQA is scored by one route, our own, and lmms-eval's function gives the same."""

# ruff: noqa: E402
from tests.integrations.needs import require_lmms_eval

require_lmms_eval()

import json
import random

import pytest
from lmms_eval.tasks.textvqa.utils import textvqa_process_results

from tests.conftest import ROOT
from unimm.evaluation.understanding.lmms_tasks import BENCHMARKS
from unimm.evaluation.understanding.textvqa import soft_accuracy

CASES = json.loads((ROOT / "tests/fixtures/answer_parsing_cases.json").read_text())["textvqa"]
PIECES = [
    *(
        "the",
        "a",
        "An",
        "two",
        "ten",
        "none",
        "Stop",
        "it's",
        "dont",
        "couldnt've",
        "oclock",
        "somebody'd",
        "Yes",
        "no",
    ),
    *("7-up", "12,000", "1,2", "3.5", "3.", "$5.00", "U.S.", "oz.", "joe's", "'s", "e.g.", "\n", "\t", " ", "é"),
    *";/[]\"{}()=+\\_-><@`,?!.:'",
]


def theirs(answer: str, annotated: list[str]) -> float:
    document = {"question_id": 1, "answers": list(annotated)}  # the function rewrites the list
    return float(textvqa_process_results(document, [answer])["exact_match"])


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['pred']}-{case['score']}")
def test_recorded_cases(case: dict) -> None:
    found = BENCHMARKS["textvqa"].row({"answers": case["answers"]}, case["pred"])
    assert found["score"] == pytest.approx(case["score"]) == theirs(case["pred"], case["answers"])
    assert found == BENCHMARKS["textvqa_ocr"].row({"answers": case["answers"]}, case["pred"])


def test_answers_of_every_awkward_form() -> None:
    rng, scores = random.Random(0), set[float]()

    def text() -> str:
        return rng.choice(["", " "]).join(rng.choice(PIECES) for _ in range(rng.randint(1, 4)))

    for _ in range(600):
        written = [text() for _ in range(3)]
        annotated = [rng.choice(written) for _ in range(10)]
        answer = rng.choice([*written, written[0].upper(), f"the {written[1]}.", text()])
        assert soft_accuracy(answer, annotated) == pytest.approx(theirs(answer, annotated)), (answer, annotated)
        scores.add(round(soft_accuracy(answer, annotated), 3))
    assert {0.0, 0.3, 0.6, 0.9, 1.0} <= scores

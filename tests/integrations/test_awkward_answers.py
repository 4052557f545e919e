"""What tests/evaluation says that lmms-eval reads from awkward answers is what it reads."""

# ruff: noqa: E402
from tests.integrations.needs import require_lmms_eval

require_lmms_eval()

import pytest
from lmms_eval.tasks.mme.utils import parse_pred_ans
from lmms_eval.tasks.mmmu.utils import parse_multi_choice_response

from tests.evaluation.awkward_answers import MME, MMMU, OPTIONS


@pytest.mark.parametrize(("text", "read"), MME.items())
def test_mme(text: str, read: str) -> None:
    assert parse_pred_ans(text) == read


@pytest.mark.parametrize(("text", "letter"), MMMU.items())
def test_mmmu(text: str, letter: str) -> None:
    assert {parse_multi_choice_response(text, list(OPTIONS), OPTIONS) for _ in range(9)} == {letter}  # none is drawn

"""Plain parsing of MMMU's open answers.

MMMU's own tool takes every number and every end of a sentence as a candidate, and accepts the answer if one of them
contains the right answer: "between 1 and 9" is right for 9, and "category" for "cat". Here an answer is the whole text,
or the only number in it.
"""

import ast
import re

from unimm.evaluation.metrics.answers import same_answer

_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:,\d{3})*(?:\.\d+)?(?![\w])")


def plain_open(answer: str, expected: str) -> bool | None:
    """Return whether an answer is one of the expected ones; None if it is empty or, for a number, names several.

    Args:
        expected: the answer, or several in the format of the benchmark's tables: "['5', 'five']".
    """
    if not answer.strip():
        return None
    accepted = accepted_answers(expected)
    if any(same_answer(answer, each) for each in accepted):
        return True
    numbers = {_value(found) for found in _NUMBER.findall(answer)}
    wanted = {_value(each) for each in accepted if _NUMBER.fullmatch(each.strip())}
    if wanted and len(numbers) > 1:
        return None
    return bool(numbers & wanted)


def accepted_answers(expected: str) -> list[str]:
    """Return the answers that a table's field stands for: itself, or the items of a list written as text."""
    if expected.strip().startswith("["):
        try:
            return [str(each) for each in ast.literal_eval(expected)]
        except (ValueError, SyntaxError):
            return [expected]
    return [expected]


def _value(number: str) -> float:
    return float(number.replace(",", ""))

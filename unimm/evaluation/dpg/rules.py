"""Scoring rules of DPG-Bench (Hu et al. 2024, https://arxiv.org/abs/2403.05135): yes-or-no questions on dense prompts.

Pure functions: no model, no files. An image's score is the fraction of its questions answered yes, and a question
counts as no if one that it depends on does. A prompt's score is the mean over its images; DPG is 100 times the mean
over prompts.

Three rules are reported. `COMPAT` reproduces the published script with its bugs, which the published figures contain:
the first row of the question file is skipped, a prompt whose question depends on a lost one is silently dropped, only
the exact string "yes" counts, and categories use the last image of a prompt, before zeroing. `FIXED` takes all rows,
images and spellings, with the same zeroing. `PLAIN` is `FIXED` with the first yes or no of an answer, whatever else it
says. An answer that a rule parses as neither yes nor no counts as no, as in the script, and as `unparsed`.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from unimm.errors import UserError
from unimm.evaluation.metrics.answers import normalize
from unimm.evaluation.metrics.yes_no import plain_reading

COLUMNS = ("item_id", "proposition_id", "dependency", "tuple", "question_natural_language")
NO_PARENT = 0

Answers = Mapping[int, str]  # question number -> answer


@dataclass(frozen=True)
class Question:
    """One question of a prompt.

    Args:
        number: 1...n within the prompt.
        parents: numbers of the questions that it depends on.
        category: the second-level category, as in "entity - whole".
    """

    number: int
    text: str
    parents: tuple[int, ...]
    category: str


class ImageScore(NamedTuple):
    """One image: `raw` answers as 0 or 1 by question number, `kept` after zeroing, `score` the mean of `kept`."""

    raw: dict[int, float]
    kept: dict[int, float]
    score: float


@dataclass(frozen=True)
class Rule:
    """One way of counting; see the module docstring. `read` maps an answer to "yes", "no" or anything else."""

    name: str
    skip_first_row: bool
    read: Callable[[str], str]
    every_image: bool
    drops_errors: bool

    def is_yes(self, answer: str) -> bool:
        """Return whether the answer counts as a yes."""
        return self.read(answer) == "yes"

    def is_parsed(self, answer: str) -> bool:
        """Return whether the answer is a yes or a no, rather than a no for lack of either."""
        return self.read(answer) in ("yes", "no")


COMPAT = Rule("official-compat", True, lambda answer: answer, every_image=False, drops_errors=True)
FIXED = Rule("fixed", False, normalize, every_image=True, drops_errors=False)
PLAIN = Rule("plain", False, plain_reading, every_image=True, drops_errors=False)


def read_questions(
    rows: Iterable[Mapping[str, Any]], rule: Rule = FIXED, *, first_row: int = 0
) -> dict[str, list[Question]]:
    """Group the rows of dpg_bench.csv into the questions of each prompt.

    Args:
        first_row: index in the file of the first of `rows`.

    Raises:
        UserError: a column is missing or unreadable, or (except with `COMPAT`) a prompt has a duplicate number or a
            question depends on a missing one.
    """
    questions: dict[str, list[Question]] = {}
    previous = None
    for index, row in enumerate(rows, start=first_row):
        if index == 0 and rule.skip_first_row:
            continue
        item, question = str(row.get("item_id")), _question(row, index)
        if item not in questions or (item != previous and rule.drops_errors):
            questions[item] = []  # the script overwrites a prompt whose rows are not contiguous
        questions[item].append(question)
        previous = item
    if not rule.drops_errors:
        for item, asked in questions.items():
            _check(item, asked)
    return questions


def score_image(questions: Sequence[Question], answers: Answers, rule: Rule = FIXED) -> ImageScore:
    """Score one image from its answers.

    Raises:
        KeyError: an answer is missing, or a question depends on a missing one.
    """
    raw = {question.number: float(rule.is_yes(answers[question.number])) for question in questions}
    kept = dict(raw)
    for question in questions:  # in row order, so that zeros propagate to later questions
        if any(kept[parent] == 0 for parent in question.parents if parent != NO_PARENT):
            kept[question.number] = 0.0
    return ImageScore(raw, kept, float(np.mean(list(kept.values()))))


def score_prompt(questions: Sequence[Question], answers: Sequence[Answers], rule: Rule = FIXED) -> list[ImageScore]:
    """Score each image of a prompt. Raise as `score_image` does."""
    return [score_image(questions, each, rule) for each in answers]


def category_answers(
    questions: Sequence[Question], scores: Sequence[ImageScore], rule: Rule = FIXED
) -> list[tuple[str, float, float]]:
    """Return (category, raw, kept) of the answers that the rule counts: on every image, or on the last one."""
    counted = scores if rule.every_image else scores[-1:]
    return [(q.category, score.raw[q.number], score.kept[q.number]) for score in counted for q in questions]


def summarize(
    questions: Mapping[str, Sequence[Question]], answers: Mapping[str, Sequence[Answers]], rule: Rule = FIXED
) -> dict[str, Any]:
    """Compute the benchmark's figures.

    Args:
        questions: from `read_questions`, with the same rule.
        answers: for each prompt, the answers about each of its images.

    Returns:
        `dpg` (times 100), None if no prompt is left; `prompts`, their number; `dropped`, the prompts that `COMPAT`
        loses; `scores` per prompt, in [0, 1]; `categories` and `level1`, means of the raw answers times 100; except
        with `COMPAT` also `categories_kept` and `level1_kept`.

    Raises:
        UserError: a prompt has no questions.
    """
    scores: dict[str, float] = {}
    dropped: list[str] = []
    found: list[tuple[str, float, float]] = []
    for item in sorted(answers):
        if not questions.get(item):
            raise UserError(f"The question file has no questions about the prompt {item}.")
        try:
            images = score_prompt(questions[item], answers[item], rule)
        except KeyError:
            if not rule.drops_errors:
                raise
            dropped.append(item)
            continue
        scores[item] = float(np.mean([image.score for image in images]))
        found += category_answers(questions[item], images, rule)
    dpg = 100 * float(np.mean(list(scores.values()))) if scores else None
    result: dict[str, Any] = {"dpg": dpg, "prompts": len(scores)}
    result |= {"dropped": dropped, "scores": scores}
    columns = {"": [(name, raw) for name, raw, _ in found]}
    if rule.every_image:
        columns["_kept"] = [(name, kept) for name, _, kept in found]
    for suffix, column in columns.items():
        result[f"categories{suffix}"] = _means(column)
        result[f"level1{suffix}"] = _means((level1(name), value) for name, value in column)
    return result


def level1(category: str) -> str:
    """Return the first level of a category: "entity" for "entity - whole"."""
    return category.split("-")[0].strip()


def _means(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    groups: dict[str, list[float]] = defaultdict(list)
    for name, value in pairs:
        groups[name].append(value)
    return {name: 100 * float(np.mean(values)) for name, values in sorted(groups.items())}


def _question(row: Mapping[str, Any], index: int) -> Question:
    if missing := [name for name in COLUMNS if row.get(name) is None]:
        raise UserError(f"Row {index + 1} of the question file has no {', '.join(missing)}.")
    try:
        number = int(row["proposition_id"])
        parents = tuple(int(part) for part in str(row["dependency"]).split(","))
    except ValueError as error:
        raise UserError(f"Row {index + 1} of the question file has no readable numbers: {error}.") from error
    category = str(row["tuple"]).split("(")[0].strip()
    return Question(number, str(row["question_natural_language"]), parents, category)


def _check(item: str, questions: Sequence[Question]) -> None:
    numbers = [question.number for question in questions]
    if len(set(numbers)) < len(numbers):
        raise UserError(f"The prompt {item} has {len(numbers)} questions under {len(set(numbers))} numbers.")
    for question in questions:
        if absent := set(question.parents) - {NO_PARENT, *numbers}:
            raise UserError(
                f"Question {question.number} of the prompt {item} depends on {min(absent)}, which it lacks."
            )

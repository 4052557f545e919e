"""DPG-Bench (Hu et al. 2024, https://arxiv.org/abs/2403.05135): yes-or-no questions about images of dense prompts.

Pure scoring: no model, no files. An image's score is the share of its questions that were answered yes, where a
question counts as no when one of those that it depends on does; a prompt's score is the mean over its images, DPG is
100 times the mean over prompts.

Three rules stand side by side. `COMPAT` is the published script with its faults, which the published
figures contain: the first row of the question file is skipped, a prompt whose question depends on a lost one is dropped
without a word, an answer counts only as the exact string "yes", and the categories come from the last image of a
prompt, before zeroing. `FIXED` takes all rows, images and spellings; its zeroing is the same. `PLAIN` is that with
the first yes or no of an answer, whatever else it says. An answer that is neither yes nor no to a rule counts as a no,
as the script has it, and is counted as `unparsed`.
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
        parents: the questions that it depends on.
        category: on the second level, as in "entity - whole".
    """

    number: int
    text: str
    parents: tuple[int, ...]
    category: str


class ImageScore(NamedTuple):
    """`raw` answers as 0 or 1, `kept` the same after zeroing, by question number; `score` is the mean of `kept`."""

    raw: dict[int, float]
    kept: dict[int, float]
    score: float


@dataclass(frozen=True)
class Rule:
    """One way of counting; see the module. `read` gives "yes", "no" or anything else of an answer."""

    name: str
    skip_first_row: bool
    read: Callable[[str], str]
    every_image: bool
    drops_errors: bool

    def is_yes(self, answer: str) -> bool:
        return self.read(answer) == "yes"

    def is_parsed(self, answer: str) -> bool:
        """Return whether the answer is a yes or a no, and not a no because nothing was found."""
        return self.read(answer) in ("yes", "no")


COMPAT = Rule("official-compat", True, lambda answer: answer, every_image=False, drops_errors=True)
FIXED = Rule("fixed", False, normalize, every_image=True, drops_errors=False)
PLAIN = Rule("plain", False, plain_reading, every_image=True, drops_errors=False)


def read_questions(
    rows: Iterable[Mapping[str, Any]], rule: Rule = FIXED, *, first_row: int = 0
) -> dict[str, list[Question]]:
    """The questions of each prompt, from the rows of dpg_bench.csv.

    Args:
        first_row: where in the file the first of `rows` stands.

    Raises:
        UserError: a column is missing or unreadable, or (by the fixed rule) a prompt has a number twice or a question
            depends on one that is not there.
    """
    questions: dict[str, list[Question]] = {}
    previous = None
    for index, row in enumerate(rows, start=first_row):
        if index == 0 and rule.skip_first_row:
            continue
        item, question = str(row.get("item_id")), _question(row, index)
        if item not in questions or (item != previous and rule.drops_errors):
            questions[item] = []  # the script forgets what it had of a prompt that comes back
        questions[item].append(question)
        previous = item
    if not rule.drops_errors:
        for item, asked in questions.items():
            _check(item, asked)
    return questions


def score_image(questions: Sequence[Question], answers: Answers, rule: Rule = FIXED) -> ImageScore:
    """One image's score by its answers.

    Raises:
        KeyError: an answer is missing, or a question depends on one that is not there.
    """
    raw = {question.number: float(rule.is_yes(answers[question.number])) for question in questions}
    kept = dict(raw)
    for question in questions:  # in the order of the rows: zeros go on to what follows
        if any(kept[parent] == 0 for parent in question.parents if parent != NO_PARENT):
            kept[question.number] = 0.0
    return ImageScore(raw, kept, float(np.mean(list(kept.values()))))


def score_prompt(questions: Sequence[Question], answers: Sequence[Answers], rule: Rule = FIXED) -> list[ImageScore]:
    """The scores of a prompt's images. Raises as `score_picture`."""
    return [score_image(questions, each, rule) for each in answers]


def category_answers(
    questions: Sequence[Question], scores: Sequence[ImageScore], rule: Rule = FIXED
) -> list[tuple[str, float, float]]:
    """(category, raw, kept) of the answers that the rule counts: of every image, or of the last one."""
    counted = scores if rule.every_image else scores[-1:]
    return [(q.category, score.raw[q.number], score.kept[q.number]) for score in counted for q in questions]


def summarize(
    questions: Mapping[str, Sequence[Question]], answers: Mapping[str, Sequence[Answers]], rule: Rule = FIXED
) -> dict[str, Any]:
    """The benchmark's figures, all times 100.

    Args:
        questions: of `read_questions`, by the same rule.
        answers: per prompt the answers about each of its images.

    Returns:
        `dpg`, None where no prompt is left; `prompts`, their number; `dropped`, the prompts that the compatible rule
        loses; `scores` per prompt; `categories` and `level1`, means of the raw answers; with the fixed rule
        `categories_kept` and `level1_kept` too.

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
    """The first level of a category: "entity" of "entity - whole"."""
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

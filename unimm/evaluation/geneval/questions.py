"""GenEval's rules as questions for a VQA model, a second scorer next to the detector.

Questions and expected answers are derived from the metadata by rule, so no question data set is needed. An image is
correct if every answer is; its `score` is the fraction of correct answers. An answer without a readable yes, no, number
or color counts as `unparsed` and wrong: nothing is guessed. Images on which the two scorers disagree are the first to
inspect (https://arxiv.org/abs/2512.16853 shows how far a detector alone can drift).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from unimm.english import plural, with_article
from unimm.evaluation.geneval.rules import COLORS
from unimm.evaluation.metrics.answers import normalize

_PHRASES = {"left of": "to the left of", "right of": "to the right of", "above": "above", "below": "below"}
_OTHER_COLORS = frozenset({"gray", "grey", "gold", "silver", "beige", "cyan", "magenta", "turquoise", "tan"})


class Question(NamedTuple):
    """A question: `kind` is existence, count, color or position; `expected` is yes, digits or a color's name."""

    kind: str
    text: str
    expected: str


class Answered(NamedTuple):
    """The verdict on one image from its answers; `read` holds the parsed answers, None if unparsed."""

    correct: bool
    score: float
    reasons: list[str]
    read: list[str | None]


class Agreement(NamedTuple):
    """Two scorers on the same images: counts of equal verdicts, and the images they disagree on."""

    both_right: int
    both_wrong: int
    only_first: list[tuple[Any, Any]]
    only_second: list[tuple[Any, Any]]

    @property
    def rate(self) -> float:
        """Return the fraction of images with equal verdicts."""
        total = self.both_right + self.both_wrong + len(self.only_first) + len(self.only_second)
        return (self.both_right + self.both_wrong) / total


def questions(metadata: Mapping[str, Any]) -> list[Question]:
    """Build the questions and expected answers of a prompt."""
    asked = []
    counted = {rule["class"] for rule in metadata.get("exclude", ())}
    include = metadata["include"]
    for rule in include:
        name = rule["class"]
        if rule["count"] > 1 or name in counted:
            asked.append(Question("count", f"How many {plural(name)} are in the picture?", str(rule["count"])))
        else:
            asked.append(Question("existence", f"Is there {with_article(name)} in the picture?", "yes"))
        if color := rule.get("color"):
            asked.append(Question("color", f"What color is the {name}?", color))
        if position := rule.get("position"):
            relation, target = position
            words = f"Is the {name} {_PHRASES[relation]} the {include[target]['class']}?"
            asked.append(Question("position", words, "yes"))
    return asked


def read_answer(kind: str, answer: str) -> str | None:
    """Parse the yes or no, number, or color of an answer; None if there is none, or several numbers or colors."""
    words = re.findall(r"[a-z0-9]+", normalize(answer))
    if kind in ("existence", "position"):
        return words[0] if words and words[0] in ("yes", "no") else None
    if kind == "count":
        found = {word for word in words if word.isdecimal()}
    else:
        found = {word for word in words if word in COLORS or word in _OTHER_COLORS}
    return found.pop() if len(found) == 1 else None


def score_answers(asked: Sequence[Question], answers: Sequence[str]) -> Answered:
    """Score the answers about one image. Raise ValueError if the numbers of answers and questions differ."""
    reasons, read = [], []
    for question, answer in zip(asked, answers, strict=True):
        understood = read_answer(question.kind, answer)
        read.append(understood)
        if understood is None:
            reasons.append(f"unparsed answer to {question.text!r}: {answer!r}")
        elif understood != question.expected:
            reasons.append(f"{question.text} expected {question.expected}, answered {understood}")
    return Answered(not reasons, 1 - len(reasons) / len(asked), reasons, read)


def agreement(first: Mapping[Any, bool], second: Mapping[Any, bool]) -> Agreement:
    """Compare two scorers, each a mapping from (item, sample) to a verdict.

    Raises:
        ValueError: they did not score the same images.
    """
    if first.keys() != second.keys():
        raise ValueError(f"the scorers saw {len(first)} and {len(second)} images, not the same ones")
    parted: dict[bool, list[tuple[Any, Any]]] = {True: [], False: []}
    same = {True: 0, False: 0}
    for key in sorted(first):
        if first[key] == second[key]:
            same[first[key]] += 1
        else:
            parted[first[key]].append(key)
    return Agreement(same[True], same[False], parted[True], parted[False])


def mean_score(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Compute the mean `score` per tag over rows with `tag` and `score`."""
    by_tag: dict[str, list[float]] = {}
    for row in rows:
        by_tag.setdefault(row["tag"], []).append(row["score"])
    return {tag: sum(scores) / len(scores) for tag, scores in by_tag.items()}

"""GenEval's rules asked as questions: a second judge of the same prompts, one that answers instead of detecting.

Questions and right answers follow from the metadata by rule, so no data set of questions is needed. A
image is right when every answer is; its `score` is the share of right answers. An answer from which no yes, number or
color can be read is counted as `unparsed` and wrong: nothing is guessed. Where this judge and the detector disagree is
where people should look first (https://arxiv.org/abs/2512.16853 shows how far a detector alone can drift).
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
    """`kind`: existence, count, color or position; `expected`: yes, digits or a color's name."""

    kind: str
    text: str
    expected: str


class Answered(NamedTuple):
    """What the answers say about one image; `read` holds what was understood of each, None where nothing was."""

    correct: bool
    score: float
    reasons: list[str]
    read: list[str | None]


class Agreement(NamedTuple):
    """Two judges on the same images: counts of each pair of verdicts, and the images that they part on."""

    both_right: int
    both_wrong: int
    only_first: list[tuple[Any, Any]]
    only_second: list[tuple[Any, Any]]

    @property
    def rate(self) -> float:
        total = self.both_right + self.both_wrong + len(self.only_first) + len(self.only_second)
        return (self.both_right + self.both_wrong) / total


def questions(metadata: Mapping[str, Any]) -> list[Question]:
    """What must be answered rightly about an image of this prompt."""
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
    """Yes or no, the one number, or the one color that an answer holds; None where it holds none, or several."""
    words = re.findall(r"[a-z0-9]+", normalize(answer))
    if kind in ("existence", "position"):
        return words[0] if words and words[0] in ("yes", "no") else None
    if kind == "count":
        found = {word for word in words if word.isdecimal()}
    else:
        found = {word for word in words if word in COLORS or word in _OTHER_COLORS}
    return found.pop() if len(found) == 1 else None


def judge_answers(asked: Sequence[Question], answers: Sequence[str]) -> Answered:
    """The verdict on one image. Raises ValueError where answers and questions differ in number."""
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
    """Compare two judges, each a mapping from (item, sample) to a verdict.

    Raises:
        ValueError: they did not judge the same images.
    """
    if first.keys() != second.keys():
        raise ValueError(f"the judges saw {len(first)} and {len(second)} images, not the same ones")
    parted: dict[bool, list[tuple[Any, Any]]] = {True: [], False: []}
    same = {True: 0, False: 0}
    for key in sorted(first):
        if first[key] == second[key]:
            same[first[key]] += 1
        else:
            parted[first[key]].append(key)
    return Agreement(same[True], same[False], parted[True], parted[False])


def mean_score(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The share of right answers per tag, averaged over images; rows with `tag` and `score`."""
    by_tag: dict[str, list[float]] = {}
    for row in rows:
        by_tag.setdefault(row["tag"], []).append(row["score"])
    return {tag: sum(scores) / len(scores) for tag, scores in by_tag.items()}

"""What the understanding benchmarks report, from their rows alone: MME, POPE, GQA, TextVQA, MMBench, SEED, MMMU, AI2D.

Special here: where papers and tools count differently, both counts stand side by side under names that say whose they
are; an answer that cannot be read is counted as `unparsed` and wrong, never replaced by a random choice (lmms-eval and
the official MMMU tool draw one), and `expected` says what such a draw would give on average.
"""

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unimm.errors import UserError
from unimm.evaluation.yes_no import Row, grouped, mean, mme_reading, mme_scores, official_reading, pope_scores

ROTATION = 1_000_000
"""MMBench's rows whose index differs by a multiple of this ask the same question with the options moved round."""
LETTERS = "ABCD"
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_scores(rows: Sequence[Row]) -> dict[str, Any]:
    """The mean of `score`, the benchmark's own score of one answer in [0, 1]."""
    return {"accuracy": mean([row["score"] for row in rows])}


def same_text(answer: str, expected: str) -> bool:
    """GQA's and AI2D's comparison: case and every punctuation mark left out, spaces kept."""
    return _letters_only(answer) == _letters_only(expected)


def _letters_only(text: str) -> str:
    return text.lower().translate(_NO_PUNCTUATION)


def seed_scores(rows: Sequence[Row]) -> dict[str, Any]:
    """SEED-Bench: the first character of the answer is the letter, or it is wrong.

    Args:
        rows: `answer`, `expected` (a letter) and `data_type`, image or video.

    Returns:
        image (what papers of image models print), video, all; `unparsed` counts answers that begin with no letter of
        the options.
    """
    right = [(row["data_type"], first_letter(row["answer"]) == row["expected"].upper()) for row in rows]
    kinds = {kind: mean([hit for of, hit in right if of == kind]) for kind in sorted({of for of, _ in right})}
    unparsed = sum(first_letter(row["answer"]) not in (*LETTERS,) for row in rows)
    return {**kinds, "all": mean([hit for _, hit in right]), "unparsed": unparsed}


def first_letter(answer: str) -> str:
    """The first character of an answer in upper case, "" of an empty one."""
    return answer.strip()[:1].upper()


def mmbench_scores(rows: Sequence[Row]) -> dict[str, Any]:
    """MMBench: a question counts when every rotation of its options is answered right.

    Args:
        rows: `index`, `choice` (the letter read from the answer, or None), `expected`, `category`, `l2`.

    Returns:
        circular (what papers print), per_row (every rotation on its own), by category and L2 category, all in percent;
        `unparsed`.

    Raises:
        UserError: a rotation whose question itself is not there.
    """
    groups: dict[int, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["index"] % ROTATION, []).append(row)
    mains = {row["index"]: row for row in rows if row["index"] < ROTATION}
    if orphans := sorted(groups.keys() - mains.keys()):
        raise UserError(f"MMBench's question {orphans[0]} is there in rotations only: take the whole split.")
    hits = [
        {**mains[index], "hit": all(row["choice"] == row["expected"] for row in group)}
        for index, group in sorted(groups.items())
    ]
    by = {
        name: {value: 100 * mean([row["hit"] for row in group]) for value, group in sorted(grouped(hits, name).items())}
        for name in ("category", "l2")
    }
    return {
        "circular": 100 * mean([row["hit"] for row in hits]),
        "per_row": 100 * mean([row["choice"] == row["expected"] for row in rows]),
        **by,
        "unparsed": sum(row["choice"] is None for row in rows),
    }


def mmmu_scores(rows: Sequence[Row]) -> dict[str, Any]:
    """MMMU, micro accuracy in [0, 1].

    Args:
        rows: `id` ("validation_Subject_7"), `correct`, and `options`, the number of choices of a question whose answer
            could not be read, else None.

    Returns:
        accuracy, where what cannot be read is wrong; expected, where it is a random choice on average; subjects.
    """
    chances = [float(row["correct"]) if row["options"] is None else 1 / row["options"] for row in rows]
    subjects = grouped([{**row, "subject": subject_of(row["id"])} for row in rows], "subject")
    return {
        "accuracy": mean([row["correct"] for row in rows]),
        "expected": mean(chances),
        "subjects": {name: mean([row["correct"] for row in group]) for name, group in sorted(subjects.items())},
        "unparsed": sum(row["options"] is not None for row in rows),
    }


def subject_of(question_id: str) -> str:
    """`validation_Art_Theory_7` -> `Art_Theory`."""
    return question_id.partition("_")[2].rpartition("_")[0]


def mmmu_choice(answer: str, options: Mapping[str, str]) -> str | None:
    """The letter that MMMU's own parser reads from an answer, None where it would draw one at random.

    Args:
        options: letter -> text.
    """
    for mark in (",", ".", "!", "?", ";", ":", "'"):
        answer = answer.strip(mark)
    text = f" {answer} "
    for before, after, last_before, last_after in (("(", ")", "(", ")"), ("", " ", " ", " "), ("", ".", " ", " ")):
        if found := [letter for letter in options if f"{before}{letter}{after}" in text]:
            return max(found, key=lambda letter: text.rfind(f"{last_before}{letter}{last_after}"))
    if len(text.split()) <= 5:
        return None
    lowered = text.lower()
    named = [letter for letter, option in options.items() if option.lower() in lowered]
    return max(named, key=lambda letter: lowered.rfind(options[letter].lower()), default=None)


def _standing_alone(row: Row) -> Any:
    return row["item"]


@dataclass(frozen=True)
class Rule:
    """How a benchmark counts.

    Args:
        scores: what it reports, from its rows.
        verdict: what one answer is worth, in [0, 1].
        cluster: answers with an equal value are not independent (questions about one picture, rotations of one).
    """

    scores: Callable[[Sequence[Row]], dict[str, Any]]
    verdict: Callable[[Row], bool | float]
    cluster: Callable[[Row], Any] = _standing_alone


_MME = Rule(mme_scores, lambda row: mme_reading(row["answer"]) == row["expected"], lambda row: row["question_id"])
_POPE = Rule(pope_scores, lambda row: official_reading(row["answer"]) == row["expected"], lambda row: row["image"])
_EXACT = Rule(exact_scores, lambda row: row["score"])
RULES: dict[str, Rule] = {
    "mme": _MME,
    "pope": _POPE,
    "gqa": _EXACT,
    "textvqa": _EXACT,
    "textvqa_ocr": _EXACT,
    "mmbench": Rule(mmbench_scores, lambda row: row["choice"] == row["expected"], lambda row: row["index"] % ROTATION),
    "seed": Rule(seed_scores, lambda row: first_letter(row["answer"]) == row["expected"]),
    "mmmu": Rule(mmmu_scores, lambda row: row["correct"]),
    "ai2d": _EXACT,
    "shapes_mme": _MME,
    "shapes_pope": _POPE,
}

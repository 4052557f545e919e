"""Scoring rules of the understanding benchmarks: MME, POPE, GQA, TextVQA, MMBench, SEED, MMMU, AI2D.

If papers and tools count differently, both counts are reported under names that say whose they are. An answer that the
benchmark's own tool cannot parse, or parses only by guessing, is counted as `unparsed`. An answer that cannot be parsed
is wrong and never replaced by a random choice (lmms-eval and the official MMMU tool draw one); `expected` is the score
that such a draw would give on average. Beside these compatible figures, `plain` reports a reading that takes only what
is written, with its own count of unparsed answers.
"""

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unimm.errors import UserError
from unimm.evaluation.metrics.choices import had_to_guess, plain_choice
from unimm.evaluation.metrics.yes_no import (
    Row,
    grouped,
    mean,
    mme_reading,
    mme_scores,
    official_reading,
    plain_reading,
    pope_scores,
    unparsed,
)

ROTATION = 1_000_000
"""MMBench rows whose indices differ by a multiple of this ask the same question with the options rotated."""
LETTERS = "ABCD"
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def choice_fields(answer: str, letter: str | None, options: Mapping[str, str]) -> dict[str, Any]:
    """Return the row fields of a multiple-choice answer, so that no score needs the options again.

    Args:
        letter: the letter parsed by the benchmark's tool, or None.
        options: letter -> text.

    Returns:
        `plain_choice`, the letter of the plain reading or None, and `guessed`, whether the answer does not contain
        `letter`.
    """
    return {"plain_choice": plain_choice(answer, options), "guessed": had_to_guess(letter, answer, options)}


def exact_scores(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the means of `score` and `plain_score`, and the number of `unparsed` answers.

    Both score one answer in [0, 1], by the benchmark's comparison and by the plain one. An answer is unparsed if the
    benchmark's normalization leaves nothing of it.
    """
    lost = sum(row["unparsed"] for row in rows)
    plain = {"accuracy": mean([row["plain_score"] for row in rows]), "unparsed": lost}
    return {"accuracy": mean([row["score"] for row in rows]), "unparsed": lost, "plain": plain}


def letter_scores(rows: Sequence[Row]) -> dict[str, Any]:
    """Return AI2D's accuracy by its own comparison (`score`) and by the plain reading (`plain_choice`)."""
    plain = {"accuracy": mean([_plain_hit(row) for row in rows]), "unparsed": _plain_lost(rows)}
    lost = sum(row["unparsed"] for row in rows)
    return {"accuracy": mean([row["score"] for row in rows]), "unparsed": lost, "plain": plain}


def _plain_hit(row: Row) -> bool:
    return row["plain_choice"] is not None and row["plain_choice"] == row["expected"].upper()


def _plain_lost(rows: Sequence[Row]) -> int:
    return sum(row["plain_choice"] is None for row in rows)


def same_text(answer: str, expected: str) -> bool:
    """Compare as GQA and AI2D do: ignore case and all punctuation, keep spaces."""
    return _letters_only(answer) == _letters_only(expected)


def _letters_only(text: str) -> str:
    return text.lower().translate(_NO_PUNCTUATION)


def seed_scores(rows: Sequence[Row]) -> dict[str, Any]:
    """Compute SEED-Bench's accuracy: an answer is right if its first character is the expected letter.

    Args:
        rows: `answer`, `expected` (a letter), `data_type` (image or video), and the fields of `choice_fields`.

    Returns:
        image (reported by papers on image models), video, all; `unparsed`, the number of answers that begin with no
        letter of the options, or with one that is part of a word; `plain`.
    """
    lost = sum(seed_unparsed(row) for row in rows)
    plain = {**_by_kind(rows, _plain_hit), "unparsed": _plain_lost(rows)}
    return {**_by_kind(rows, seed_right), "unparsed": lost, "plain": plain}


def _by_kind(rows: Sequence[Row], right: Callable[[Row], bool]) -> dict[str, float]:
    kinds = {kind: mean([right(row) for row in group]) for kind, group in sorted(grouped(rows, "data_type").items())}
    return {**kinds, "all": mean([right(row) for row in rows])}


def seed_right(row: Row) -> bool:
    """Return whether the first character of the answer is the expected letter."""
    return first_letter(row["answer"]) == row["expected"].upper()


def seed_unparsed(row: Row) -> bool:
    """Return whether the first character is no letter of the options, or one only by accident."""
    return row["guessed"] or first_letter(row["answer"]) not in (*LETTERS,)


def first_letter(answer: str) -> str:
    """Return the first character of an answer in upper case, "" for an empty answer."""
    return answer.strip()[:1].upper()


def mmbench_scores(rows: Sequence[Row]) -> dict[str, Any]:
    """Compute MMBench's accuracy: a question is right if every rotation of its options is answered right.

    Args:
        rows: `index`, `choice` (the letter parsed from the answer, or None), `expected`, `category`, `l2`, and the
            fields of `choice_fields`.

    Returns:
        circular (reported by papers), per_row (every rotation by itself), by category and L2 category, all in percent;
        `unparsed`; `plain`.

    Raises:
        UserError: a rotation is present without its unrotated question.
    """
    groups: dict[int, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["index"] % ROTATION, []).append(row)
    mains = {row["index"]: row for row in rows if row["index"] < ROTATION}
    if orphans := sorted(groups.keys() - mains.keys()):
        raise UserError(f"MMBench's question {orphans[0]} is there in rotations only: take the whole split.")

    def figures(right: Callable[[Row], bool]) -> dict[str, Any]:
        hits = [{**mains[index], "hit": all(map(right, group))} for index, group in sorted(groups.items())]
        by = {
            name: {
                kind: 100 * mean([row["hit"] for row in group]) for kind, group in sorted(grouped(hits, name).items())
            }
            for name in ("category", "l2")
        }
        circular = 100 * mean([row["hit"] for row in hits])
        return {"circular": circular, "per_row": 100 * mean([right(row) for row in rows]), **by}

    plain = {**figures(_plain_hit), "unparsed": _plain_lost(rows)}
    return {**figures(_chosen), "unparsed": sum(map(_choice_lost, rows)), "plain": plain}


def _chosen(row: Row) -> bool:
    return bool(row["choice"] == row["expected"])


def _choice_lost(row: Row) -> bool:
    return row["choice"] is None or row["guessed"]


def mmmu_scores(rows: Sequence[Row]) -> dict[str, Any]:
    """Compute MMMU's micro accuracy in [0, 1].

    Args:
        rows: `id` ("validation_Subject_7"); `correct`; `options`, the number of choices if the answer could not be
            parsed, else None; `unparsed`, whether it could not be parsed or was a guess; `plain_correct`, None if the
            plain reading finds nothing.

    Returns:
        accuracy (an unparsed answer is wrong), expected (an unparsed answer scores as a random choice on average),
        subjects, `unparsed`, `plain`.
    """
    chances = [float(row["correct"]) if row["options"] is None else 1 / row["options"] for row in rows]
    subjects = grouped([{**row, "subject": subject_of(row["id"])} for row in rows], "subject")
    return {
        "accuracy": mean([row["correct"] for row in rows]),
        "expected": mean(chances),
        "subjects": {name: mean([row["correct"] for row in group]) for name, group in sorted(subjects.items())},
        "unparsed": sum(row["unparsed"] for row in rows),
        "plain": {
            "accuracy": mean([bool(row["plain_correct"]) for row in rows]),
            "unparsed": sum(row["plain_correct"] is None for row in rows),
        },
    }


def subject_of(question_id: str) -> str:
    """Return the subject of a question: `validation_Art_Theory_7` -> `Art_Theory`."""
    return question_id.partition("_")[2].rpartition("_")[0]


def mmmu_choice(answer: str, options: Mapping[str, str]) -> str | None:
    """Return the letter that MMMU's own parser finds in an answer, None if it would draw one at random.

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
    """The scoring rule of a benchmark.

    Args:
        scores: computes the reported scores from the rows.
        verdict: score of one answer by the benchmark's own reading, in [0, 1].
        plain: the same by the plain reading.
        unparsed: whether the benchmark's own reading finds nothing in an answer, or guesses.
        cluster: key of a cluster; answers with equal keys are not independent (questions about one image, rotations of
            one question).
    """

    scores: Callable[[Sequence[Row]], dict[str, Any]]
    verdict: Callable[[Row], bool | float]
    plain: Callable[[Row], bool | float]
    unparsed: Callable[[Row], bool]
    cluster: Callable[[Row], Any] = _standing_alone


def _yes_no(
    scores: Callable[[Sequence[Row]], dict[str, Any]], read: Callable[[str], str], cluster: Callable[[Row], Any]
) -> Rule:
    return Rule(
        scores,
        lambda row: read(row["answer"]) == row["expected"],
        lambda row: plain_reading(row["answer"]) == row["expected"],
        lambda row: unparsed(row["answer"], read),
        cluster,
    )


_MME = _yes_no(mme_scores, mme_reading, lambda row: row["question_id"])
_POPE = _yes_no(pope_scores, official_reading, lambda row: row["image"])
_EXACT = Rule(exact_scores, lambda row: row["score"], lambda row: row["plain_score"], lambda row: row["unparsed"])
RULES: dict[str, Rule] = {
    "mme": _MME,
    "pope": _POPE,
    "gqa": _EXACT,
    "textvqa": _EXACT,
    "textvqa_ocr": _EXACT,
    "mmbench": Rule(mmbench_scores, _chosen, _plain_hit, _choice_lost, lambda row: row["index"] % ROTATION),
    "seed": Rule(seed_scores, seed_right, _plain_hit, seed_unparsed),
    "mmmu": Rule(
        mmmu_scores,
        lambda row: row["correct"],
        lambda row: bool(row["plain_correct"]),
        lambda row: row["unparsed"],
    ),
    "ai2d": Rule(letter_scores, lambda row: row["score"], _plain_hit, lambda row: row["unparsed"]),
    "shapes_mme": _MME,
    "shapes_pope": _POPE,
}

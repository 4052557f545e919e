"""Yes-or-no questions: four ways to parse an answer, and the scores of POPE (https://arxiv.org/abs/2305.10355) and MME
(https://arxiv.org/abs/2306.13394).

The parsers ("readings") disagree: "Yes." is wrong for lmms-eval's POPE and right for the official one, for which "NO"
is a yes. So each score names its reading. Answers that are neither yes nor no, and answers from which a tool guesses a
yes or no that is not written in them, are counted as `unparsed`.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from unimm.errors import UserError

Row = Mapping[str, Any]
PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
OTHER = "other"
_MARKUP = re.compile(r"[^\w\s]|_")


def mme_reading(answer: str) -> str:
    """Return "yes", "no" or "other" as MME's own tool does: by the first four characters."""
    text = answer.lower().strip().replace(".", "")
    if len(text) == 1:
        return {"y": "yes", "n": "no"}.get(text, OTHER)
    return next((word for word in ("yes", "no") if word in text[:4]), OTHER)


def strict_reading(answer: str) -> str:
    """Parse as lmms-eval's POPE does: the whole answer is yes or no, or it is wrong."""
    text = answer.lower().strip()
    return text if text in ("yes", "no") else OTHER


def official_reading(answer: str) -> str:
    """Parse as POPE's own script does: a first sentence without the words "No", "not" or "no" is a yes."""
    words = answer.partition(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def plain_reading(answer: str) -> str:
    """Return the first word that is yes or no, ignoring case, punctuation and markup."""
    return next((word for word in _words(answer) if word in ("yes", "no")), OTHER)


def _words(answer: str) -> list[str]:
    return _MARKUP.sub(" ", answer.casefold()).split()


def mme_guesses(answer: str) -> bool:
    """Return whether MME's tool finds neither yes nor no, or one that is not a word of it ("Noise", "Not me")."""
    read, words = mme_reading(answer), _words(answer)
    # a lone "y" or "n" is an abbreviation, not a guess
    return read == OTHER or (read not in words and words != [read[0]])


def official_guesses(answer: str) -> bool:
    """Return whether POPE's script takes an answer as a yes although no "yes" is written, because it finds no "no"."""
    return official_reading(answer) == "yes" and plain_reading(answer) != "yes"


POPE_READINGS: dict[str, Callable[[str], str]] = {
    "official": official_reading,
    "lmms_eval": strict_reading,
    "plain": plain_reading,
}
_GUESSES = {official_reading: official_guesses, mme_reading: mme_guesses}


def pope_scores(rows: Sequence[Row]) -> dict[str, Any]:
    """Compute POPE's scores by each reading.

    Args:
        rows: `answer`, `expected` (yes or no) and `category`, the split (random, popular, adversarial).

    Returns:
        reading -> {split: its scores, "mean_f1": mean over splits, as in LLaVA's papers, "pooled": over all rows}.
    """
    scores: dict[str, Any] = {}
    for name, read in POPE_READINGS.items():
        # lmms-eval does not count a verbose answer as a miss, which raises its recall
        forgiving = name == "lmms_eval"
        splits = {split: binary_scores(group, read, forgiving) for split, group in grouped(rows, "category").items()}
        mean_f1 = mean([split["f1"] for split in splits.values()])
        scores[name] = {**splits, "mean_f1": mean_f1, "pooled": binary_scores(rows, read, forgiving)}
    return scores


def binary_scores(
    rows: Sequence[Row], read: Callable[[str], str] = plain_reading, forgiving: bool = False
) -> dict[str, float]:
    """Compute accuracy, precision, recall, f1 and yes_ratio (of the predictions), all in [0, 1], and the number of
    `unparsed` answers (neither yes nor no, or a guess).

    Args:
        rows: `answer` and `expected`.
        forgiving: whether an expected yes that was answered with neither is left out of the recall.
    """
    pairs = [(read(row["answer"]), row["expected"]) for row in rows]
    hits = pairs.count(("yes", "yes"))
    precision = ratio(hits, hits + pairs.count(("yes", "no")))
    missed = pairs.count(("no", "yes")) + (0 if forgiving else pairs.count((OTHER, "yes")))
    recall = ratio(hits, hits + missed)
    return {
        "accuracy": mean([found == expected for found, expected in pairs]),
        "precision": precision,
        "recall": recall,
        "f1": ratio(2 * precision * recall, precision + recall),
        "yes_ratio": mean([found == "yes" for found, _ in pairs]),
        "unparsed": sum(unparsed(row["answer"], read) for row in rows),
    }


def unparsed(answer: str, read: Callable[[str], str]) -> bool:
    """Return whether a reading finds neither yes nor no in an answer, or has to guess."""
    return _GUESSES[read](answer) if read in _GUESSES else read(answer) == OTHER


def mme_scores(rows: Sequence[Row]) -> dict[str, Any]:
    """Compute MME's scores. Every image has two questions; a category's score is the accuracy plus the share of images
    with both right, in percent.

    Args:
        rows: `answer`, `expected`, `category` and `question_id`, which the two questions about an image share.

    Returns:
        perception (at most 2000), cognition (at most 800), the categories' acc, acc_plus and score, `unparsed`; and
        `plain`, the same by the plain reading.

    Raises:
        UserError: an image does not have two questions, or a category is unknown.
    """
    return {**_mme_scores(rows, mme_reading), "plain": _mme_scores(rows, plain_reading)}


def _mme_scores(rows: Sequence[Row], read: Callable[[str], str]) -> dict[str, Any]:
    categories = {}
    for category, group in grouped(rows, "category").items():
        if category not in PERCEPTION + COGNITION:
            raise UserError(f"MME has no category {category!r}; it has {', '.join(PERCEPTION + COGNITION)}.")
        right = [_both(name, pair, read) for name, pair in grouped(group, "question_id").items()]
        acc, acc_plus = 50 * mean(right), 100 * mean([count == 2 for count in right])
        categories[category] = {"acc": acc, "acc_plus": acc_plus, "score": acc + acc_plus}
    totals = {
        part: sum(categories[name]["score"] for name in names if name in categories)
        for part, names in (("perception", PERCEPTION), ("cognition", COGNITION))
    }
    return {**totals, "categories": categories, "unparsed": sum(unparsed(row["answer"], read) for row in rows)}


def _both(name: str, pair: Sequence[Row], read: Callable[[str], str]) -> int:
    """Return how many of an image's two questions are answered right."""
    if len(pair) != 2:
        raise UserError(f"MME asks 2 questions about each image, {name} has {len(pair)}: give an even limit.")
    return sum(read(row["answer"]) == row["expected"] for row in pair)


def grouped(rows: Sequence[Row], key: str) -> dict[str, list[Row]]:
    """Group rows by the value of `key`, in the order of their first row."""
    groups = defaultdict(list)
    for row in rows:
        groups[row[key]].append(row)
    return dict(groups)


def mean(values: Sequence[float]) -> float:
    """Return the mean, 0 for no values."""
    return ratio(sum(values), len(values))


def ratio(part: float, whole: float) -> float:
    """Return part / whole, 0 if `whole` is 0."""
    return float(part / whole) if whole else 0.0

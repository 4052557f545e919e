"""Yes-or-no questions: four readings of an answer, and the scores of POPE (https://arxiv.org/abs/2305.10355) and MME
(https://arxiv.org/abs/2306.13394).

The readings disagree ("Yes." is wrong for lmms-eval's POPE and right for the official one; "NO" is a yes there), so a
score is named by its reading. Answers that are neither, and those from which a tool guesses a yes or no that is not
written in them, are counted as `unparsed`.
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
    """ "yes", "no" or "other" as MME's own tool reads it: by the first four characters."""
    text = answer.lower().strip().replace(".", "")
    if len(text) == 1:
        return {"y": "yes", "n": "no"}.get(text, OTHER)
    return next((word for word in ("yes", "no") if word in text[:4]), OTHER)


def strict_reading(answer: str) -> str:
    """As lmms-eval's POPE: the whole answer is yes or no, or it is wrong."""
    text = answer.lower().strip()
    return text if text in ("yes", "no") else OTHER


def official_reading(answer: str) -> str:
    """As POPE's own script: a first sentence without "No", "not" or "no" among its words is a yes."""
    words = answer.partition(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def plain_reading(answer: str) -> str:
    """The first word that is yes or no, whatever its case, punctuation and markup."""
    return next((word for word in _words(answer) if word in ("yes", "no")), OTHER)


def _words(answer: str) -> list[str]:
    return _MARKUP.sub(" ", answer.casefold()).split()


def mme_guesses(answer: str) -> bool:
    """Return whether MME's tool finds neither yes nor no, or one that is no word of the answer ("Noise", "Not me")."""
    read, words = mme_reading(answer), _words(answer)
    return read == OTHER or (read not in words and words != [read[0]])


def official_guesses(answer: str) -> bool:
    """Return whether POPE's script takes an answer for a yes because it finds no "no", though no yes is written."""
    return official_reading(answer) == "yes" and plain_reading(answer) != "yes"


POPE_READINGS: dict[str, Callable[[str], str]] = {
    "official": official_reading,
    "lmms_eval": strict_reading,
    "plain": plain_reading,
}
_GUESSES = {official_reading: official_guesses, mme_reading: mme_guesses}


def pope_scores(rows: Sequence[Row]) -> dict[str, Any]:
    """POPE by each reading.

    Args:
        rows: `answer`, `expected` (yes or no) and `category`, the split (random, popular, adversarial).

    Returns:
        reading -> {split: its scores, "mean_f1": of the splits, which LLaVA's papers print, "pooled": over all}.
    """
    scores: dict[str, Any] = {}
    for name, read in POPE_READINGS.items():
        # a verbose answer is no miss for lmms-eval, which raises its recall
        forgiving = name == "lmms_eval"
        splits = {split: binary_scores(group, read, forgiving) for split, group in grouped(rows, "category").items()}
        mean_f1 = mean([split["f1"] for split in splits.values()])
        scores[name] = {**splits, "mean_f1": mean_f1, "pooled": binary_scores(rows, read, forgiving)}
    return scores


def binary_scores(
    rows: Sequence[Row], read: Callable[[str], str] = plain_reading, forgiving: bool = False
) -> dict[str, float]:
    """accuracy, precision, recall, f1 and yes_ratio (of the predictions), all in [0, 1], and how many were `unparsed`:
    neither, or a guess.

    Args:
        rows: `answer` and `expected`.
        forgiving: whether a yes that was answered with neither counts as no miss in the recall.
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
    """MME: every image has two questions; a category's score is the accuracy plus the share of images with both
    right, in percent.

    Args:
        rows: `answer`, `expected`, `category` and `question_id`, which the two questions about an image share.

    Returns:
        perception (at most 2000), cognition (at most 800), their categories' acc, acc_plus and score, `unparsed`; and
        `plain`, the same by the plain reading.

    Raises:
        UserError: an image without its two questions, or an unknown category.
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
    """How many of an image's two questions are right."""
    if len(pair) != 2:
        raise UserError(f"MME asks 2 questions about each image, {name} has {len(pair)}: give an even limit.")
    return sum(read(row["answer"]) == row["expected"] for row in pair)


def grouped(rows: Sequence[Row], key: str) -> dict[str, list[Row]]:
    """Rows by the value of `key`, in the order of their first row."""
    groups = defaultdict(list)
    for row in rows:
        groups[row[key]].append(row)
    return dict(groups)


def mean(values: Sequence[float]) -> float:
    """The mean, 0 of nothing."""
    return ratio(sum(values), len(values))


def ratio(part: float, whole: float) -> float:
    """part / whole, 0 where there is nothing."""
    return float(part / whole) if whole else 0.0

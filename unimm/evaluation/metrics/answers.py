"""Comparison of short answers: a color, a number, yes or no, a relation.

Strict on content, lenient on form: case, articles, punctuation around words, repeated spaces and "2" for "two" do not
matter, any other word does. "No, there is none" is not "no".
"""

import re

ARTICLES = frozenset({"a", "an", "the"})
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: str(number) for number, word in enumerate(NUMBER_WORDS)}
_SURROUNDING = re.compile(r"^[\W_]+|[\W_]+$")


def normalize(answer: str) -> str:
    """Normalize an answer: lower case, without articles and outer punctuation, number words as digits."""
    words = (_SURROUNDING.sub("", word) for word in answer.lower().split())
    return " ".join(_NUMBERS.get(word, word) for word in words if word and word not in ARTICLES)


def same_answer(answer: str, expected: str) -> bool:
    """Return whether two answers are equal after `normalize`; an empty answer is never right."""
    return bool(normalized := normalize(answer)) and normalized == normalize(expected)

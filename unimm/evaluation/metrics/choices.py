"""Plain parsing of multiple-choice answers: find the option that an answer names.

The benchmarks' own tools tend to find a letter in any answer: for one, the first character of "Because" is option B,
for another "DNA" ends in option A. Here only a letter that stands by itself counts, or an option whose text is written
out.
"""

import re
from collections.abc import Mapping

from unimm.evaluation.metrics.answers import normalize

_ANNOUNCED = re.compile(
    r"\b(?:answer|option|choice|letter)(?:\s+is)?\s*:?\s*[\(\[*\"']*([A-Z])(?![\w'])", re.IGNORECASE
)
_ALONE = re.compile(r"(?<![\w'])([A-Z])(?![\w'])")
_WORDS = re.compile(r"(?<![\w'])[AI](?=\s+(?!(?:or|and|is|but|not)\b)[a-z])")  # the article, and "I think"
_BARE = re.compile(r"[\W_]*([A-Za-z])[\W_]*")


def plain_choice(answer: str, options: Mapping[str, str]) -> str | None:
    """Return the letter of the one option that an answer names; None if it names none, or several.

    Args:
        options: letter -> text.
    """
    letters = letters_in(answer) & options.keys()
    if letters:
        return letters.pop() if len(letters) == 1 else None
    named = options_in(answer, options)
    return named.pop() if len(named) == 1 else None


def had_to_guess(letter: str | None, answer: str, options: Mapping[str, str]) -> bool:
    """Return whether a tool's `letter` appears in the answer neither as a letter nor as an option's text."""
    return letter is not None and letter not in letters_in(answer) | options_in(answer, options)


def letters_in(answer: str) -> set[str]:
    """Return the letters that an answer announces ("the answer is C, not D"), else those that stand by themselves.

    A small letter counts only if nothing follows it ("b", "Answer: b."); "A dog" and "I think" hold no letter.
    """
    if bare := _BARE.fullmatch(answer):
        return {bare[1].upper()}
    found = [(match[1], answer[match.end() :]) for match in _ANNOUNCED.finditer(answer)]
    announced = {letter.upper() for letter, rest in found if letter.isupper() or not re.search(r"\w", rest)}
    return announced or set(_ALONE.findall(_WORDS.sub(" ", answer)))


def options_in(answer: str, options: Mapping[str, str]) -> set[str]:
    """Return the letters of the options whose text the answer contains, word for word.

    "cat" is not named by "cat food" if that is an option too.
    """
    said = f" {_words(answer)} "
    texts = {letter: f" {_words(text)} " for letter, text in options.items()}
    named = {letter: text for letter, text in texts.items() if text.strip() and text in said}
    return {
        letter for letter, text in named.items() if not any(text != other and text in other for other in named.values())
    }


def _words(text: str) -> str:
    """Return the words of a text after `normalize`, without any punctuation between them."""
    return " ".join(normalize(re.sub(r"[^\w.'%-]+", " ", text)).split())

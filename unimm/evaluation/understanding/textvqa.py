"""TextVQA's soft accuracy over ten annotators (https://arxiv.org/abs/1904.08920), with the answer processing of EvalAI.

The processing is the VQA challenge's, quirks included, because published figures use it. Commas and question marks are
removed and "'s" becomes a word; other punctuation is removed if it touches a space (or if any number has a comma), else
replaced by a space; contractions without their apostrophe get it back; "none" is 0.
"""

import re
from collections.abc import Callable, Sequence

import numpy as np

from unimm.evaluation.metrics.answers import ARTICLES, NUMBER_WORDS, normalize

AGREEING = 3  # annotators who make an answer wholly right

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"(?<=\d),+(?=\d)")
_PERIOD = re.compile(r"\.(?!\d)")
_NUMBERS = {"none": "0", **{word: str(number) for number, word in enumerate(NUMBER_WORDS)}}
_CONTRACTED = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've "
    "needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've "
    "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll "
    "that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've "
    "weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've "
    "why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're "
    "you've"
)
# Each contraction with one of its apostrophes left out; one entry of the published table is reversed.
_CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTED.split()
    for place, character in enumerate(word)
    if character == "'"
} | {"somebody'd": "somebodyd"}


def process(answer: str) -> str:
    """Normalize an answer for comparison, as EvalAI does."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    whole, in_number = text, _COMMA_IN_NUMBER.search(text) is not None
    for mark in _PUNCTUATION:
        touches = f"{mark} " in whole or f" {mark}" in whole
        text = text.replace(mark, "" if touches or in_number else " ")
    words = [_NUMBERS.get(word, word) for word in _PERIOD.sub("", text).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def soft_accuracy(answer: str, annotated: Sequence[str], form: Callable[[str], str] = process) -> float:
    """Return the mean over the annotators of min(1, agreeing others / 3), after normalizing answers with `form`.

    Raises ValueError if there are no annotators.
    """
    if not annotated:
        raise ValueError("an answer is scored against annotated ones, and there are none")
    found, others = form(answer), [form(each) for each in annotated]
    agreeing = others.count(found)
    return float(np.mean([min(1.0, (agreeing - (other == found)) / AGREEING) for other in others]))


def plain_accuracy(answer: str, annotated: Sequence[str]) -> float:
    """Return the soft accuracy with `normalize` in place of EvalAI's processing; 0 for an empty answer."""
    return soft_accuracy(answer, annotated, normalize) if normalize(answer) else 0.0

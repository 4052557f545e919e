"""Which tokens of a conversation are the assistant's: by the spans that its chat template marks, turn by turn.

Special here: nothing is tokenized in pieces. A turn's tokens are those that overlap its `{% generation %}` span in the
rendered text, also where a token reaches over the span's edge (" yes" behind "ASSISTANT:") and where a picture's
placeholder became many tokens in front of it. White space that a tokenizer leaves out of its offsets (ByteLevel's
`trim_offsets`, as in Llama 3, reports an empty place for "\\n\\n") counts from the end of the token before. A turn
without a span, a span without its turn's text and a turn without a token are errors that print the turn. T assistant
turns, L tokens.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from unimm.errors import UserError

Span = tuple[int, int]
"""Start and end in the rendered text, in characters."""


def rendered(sample: Mapping[str, Any], chat_template: str, tokens: Mapping[str, Any]) -> tuple[str, list[Span]]:
    """The sample's text and the span of each of its assistant's turns.

    Args:
        sample: {"flow", "index", "messages"}.
        tokens: special tokens by name, which the template may use.

    Raises:
        UserError: no assistant turn, a template that does not mark every one of them, or that refuses the sample.
    """
    try:
        (text,), (spans,) = render_jinja_template(
            conversations=[sample["messages"]],
            chat_template=chat_template,
            return_assistant_tokens_mask=True,
            **tokens,
        )
    except TemplateError as error:
        raise UserError(f"{_named(sample)}: the chat template refuses it: {error.message}.") from None
    answers = assistant_turns(sample)
    if not answers or len(spans) != len(answers):
        raise UserError(
            f"{_named(sample)} ({_text(sample['messages'][0])[:60]!r}...) has {len(answers)} assistant turns and "
            f"{len(spans)} label spans: the chat template must put {{% generation %}} around every answer, and no "
            "sample may lack one."
        )
    for number, (turn, (start, end)) in enumerate(zip(answers, spans, strict=True), start=1):
        if missing := [said for said in _texts(turn) if said.strip() not in text[start:end]]:
            raise UserError(
                f"{_named(sample)}: the chat template marks {text[start:end]!r} as assistant turn {number}, which says "
                f"{missing[0]!r}: the marks and the turns do not match."
            )
    return text, list(spans)


def turn_tokens(spans: Sequence[Span], offsets: np.ndarray, replacements: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """The tokens of each span, bool [T, L].

    Args:
        offsets: start and end of each token in the text with its placeholders replaced [L, 2]; (0, 0) for tokens that
            stand for no text.
        replacements: {"span", "new_span"} of each replaced placeholder, in order.
    """
    ends = [each["span"][1] for each in replacements]
    gained = [0, *(each["new_span"][1] - each["span"][1] for each in replacements)]
    starts, stops = offsets[:, 0].copy(), offsets[:, 1]
    empty = (starts == stops) & (stops > 0)
    starts[1:][empty[1:]] = stops[:-1][empty[1:]]
    masks = np.zeros((len(spans), len(offsets)), dtype=bool)
    for mask, span in zip(masks, spans, strict=True):
        start, end = (char + gained[bisect_right(ends, char)] for char in span)
        mask[:] = (starts < end) & (stops > start)
    return masks


def check_every_turn_has_tokens(sample: Mapping[str, Any], masks: np.ndarray) -> None:
    """Raise UserError, with the turn, where a row of the masks [T, L] is empty."""
    for number, (turn, mask) in enumerate(zip(assistant_turns(sample), masks, strict=True), start=1):
        if not mask.any():
            raise UserError(
                f"{_named(sample)}: no token of assistant turn {number}, {_text(turn)!r}, is learned: the chat "
                "template must mark at least what closes an answer."
            )


def check_no_marker(sample: Mapping[str, Any], marker: str) -> None:
    """Raise UserError where a text holds the string that stands for a picture."""
    for turn in sample["messages"]:
        if marker in _text(turn):
            raise UserError(f"{_named(sample)}: the {turn['role']}'s turn {_text(turn)!r} holds {marker}, a picture's.")


def parts_of(turn: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a turn holds, one part for a plain string."""
    return [{"type": "text", "text": turn["content"]}] if isinstance(turn["content"], str) else turn["content"]


def assistant_turns(sample: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [turn for turn in sample["messages"] if turn["role"] == "assistant"]


def _texts(turn: Mapping[str, Any]) -> list[str]:
    return [part["text"] for part in parts_of(turn) if part["type"] == "text"]


def _text(turn: Mapping[str, Any]) -> str:
    return "".join(_texts(turn))


def _named(sample: Mapping[str, Any]) -> str:
    return f"Sample {sample['index']} of the flow {sample['flow']!r}"

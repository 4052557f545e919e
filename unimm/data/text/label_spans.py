"""Label masks of conversations: find the assistant's tokens from the spans that the chat template marks, or, for a
template without marks, from where it writes each answer.

The text is tokenized once, as a whole. A turn's tokens are those that overlap its `{% generation %}` span in the
rendered text, also if a token crosses the span's edge (" yes" after "ASSISTANT:") or if an image placeholder before it
was expanded to many tokens. White space that a tokenizer leaves out of its offsets (ByteLevel's `trim_offsets`, as in
Llama 3, reports an empty span for "\\n\\n") counts from the end of the previous token. A turn without a span, a span
without its turn's text and a turn without a token raise errors that print the turn. T assistant turns, L tokens.
"""

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from unimm.errors import UserError

Span = tuple[int, int]
"""Start and end in the rendered text, in characters."""

OPEN, CLOSE = "\U000f0002", "\U000f0003"
_MARKS = re.compile(r"{%-?\s*generation\s*-?%}")


def rendered(
    sample: Mapping[str, Any], chat_template: str | Mapping[str, str], tokens: Mapping[str, Any]
) -> tuple[str, list[Span]]:
    """Render the sample's text and return it with the span of each assistant turn.

    Args:
        sample: {"flow", "index", "messages"}.
        chat_template: one template, or several by name, of which "default" is used.
        tokens: special tokens by name, for the template.

    Raises:
        UserError: there is no assistant turn, or the template does not mark every one of them or rejects the sample.
    """
    template = chat_template if isinstance(chat_template, str) else chat_template["default"]
    marks = _MARKS.search(template) is not None
    try:
        if marks:
            (text,), (spans,) = render_jinja_template(
                conversations=[sample["messages"]],
                chat_template=template,
                return_assistant_tokens_mask=True,
                **tokens,
            )
        else:
            text, spans = _found(sample["messages"], template, tokens)
    except TemplateError as error:
        raise UserError(f"{_named(sample)}: the chat template refuses it: {error.message}.") from None
    answers = assistant_turns(sample)
    if not answers or len(spans) != len(answers):
        raise UserError(
            f"{_named(sample)} ({_text(sample['messages'][0])[:60]!r}...) has {len(answers)} assistant turns and "
            f"{len(spans)} label spans: the chat template must put {{% generation %}} around every answer or write it "
            "word for word, and no sample may lack one."
        )
    for number, (turn, (start, end)) in enumerate(zip(answers, spans, strict=True), start=1):
        if missing := [said for said in _texts(turn) if said.strip() not in text[start:end]]:
            raise UserError(
                f"{_named(sample)}: the chat template marks {text[start:end]!r} as assistant turn {number}, which says "
                f"{missing[0]!r}: the marks and the turns do not match."
            )
    return text, list(spans)


def _found(messages: Sequence[Mapping[str, Any]], template: str, tokens: Mapping[str, Any]) -> tuple[str, list[Span]]:
    """Return the text and the span of each answer, for a template without `{% generation %}`.

    Two private-use characters around an answer's text locate it. Its span starts where the generation prompt ends and
    includes the tokens that close a turn. No spans are returned if the markers change the rendered text.
    """

    def render(turns: Sequence[Mapping[str, Any]], prompt: bool = False) -> str:
        how = {"chat_template": template, "add_generation_prompt": prompt, **tokens}
        return str(render_jinja_template(conversations=[list(turns)], **how)[0][0])

    text = render(messages)
    pieces = re.split(f"([{OPEN}{CLOSE}])", render([_fenced(turn) for turn in messages]))
    if "".join(piece for piece in pieces if piece not in (OPEN, CLOSE)) != text:
        return text, []
    said: Any = [{"type": "text", "text": "?"}] if isinstance(messages[0]["content"], list) else "?"
    exchange = [{"role": "user", "content": said}, _fenced({"role": "assistant", "content": said})]
    closing = render(exchange).rpartition(CLOSE)[2]
    closing = closing.rstrip() or closing  # white space after a closing token is not a label
    answers = (number for number, turn in enumerate(messages) if turn["role"] == "assistant")
    spans: list[Span] = []
    place = 0
    opened = None
    for piece in pieces:
        if piece == OPEN:
            opened = place
        elif piece == CLOSE:
            start = place if opened is None else opened  # a template may cut off the start of an answer
            prompt = render(messages[: next(answers)], prompt=True)
            start = len(prompt) if len(prompt) <= start and text.startswith(prompt) else start
            after = len(text) - len(text[place:].lstrip())
            ends = [at + len(closing) for at in (place, after) if text.startswith(closing, at)]
            spans.append((start, ends[0] if ends else place))
            opened = None
        else:
            place += len(piece)
    return text, spans


def _fenced(turn: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return an assistant turn with the two markers around its text, inside the white space that templates trim."""
    if turn["role"] != "assistant":
        return turn
    content = turn["content"]
    if isinstance(content, str):
        inner = content.strip()
        before, _, after = content.partition(inner) if inner else ("", "", content)
        return {**turn, "content": f"{before}{OPEN}{inner}{CLOSE}{after}"}
    if len(content) == 1 and content[0]["type"] == "text":
        return {
            **turn,
            "content": [{**content[0], "text": _fenced({**turn, "content": content[0]["text"]})["content"]}],
        }
    return {**turn, "content": [{"type": "text", "text": OPEN}, *content, {"type": "text", "text": CLOSE}]}


def turn_tokens(spans: Sequence[Span], offsets: np.ndarray, replacements: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Return the token mask of each span, bool [T, L].

    Args:
        offsets: start and end of each token in the text with expanded placeholders [L, 2]; (0, 0) for tokens without
            text.
        replacements: {"span", "new_span"} of each expanded placeholder, in order.
    """
    ends = [each["span"][1] for each in replacements]
    gained = [0, *(each["new_span"][1] - each["span"][1] for each in replacements)]
    starts, stops = offsets[:, 0].copy(), offsets[:, 1]
    # White space with an empty offset span starts where the previous token ends (ByteLevel's `trim_offsets`).
    empty = (starts == stops) & (stops > 0)
    starts[1:][empty[1:]] = stops[:-1][empty[1:]]
    masks = np.zeros((len(spans), len(offsets)), dtype=bool)
    for mask, span in zip(masks, spans, strict=True):
        # Shift the span by what the placeholders before it gained when they were expanded to image tokens.
        start, end = (char + gained[bisect_right(ends, char)] for char in span)
        mask[:] = (starts < end) & (stops > start)
    return masks


def check_every_turn_has_tokens(sample: Mapping[str, Any], masks: np.ndarray) -> None:
    """Raise UserError, with the turn, if a row of the masks [T, L] is empty."""
    for number, (turn, mask) in enumerate(zip(assistant_turns(sample), masks, strict=True), start=1):
        if not mask.any():
            raise UserError(
                f"{_named(sample)}: no token of assistant turn {number}, {_text(turn)!r}, is learned: the chat "
                "template must mark at least what closes an answer."
            )


def parts_of(turn: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the content parts of a turn; a plain string becomes one text part."""
    return [{"type": "text", "text": turn["content"]}] if isinstance(turn["content"], str) else turn["content"]


def assistant_turns(sample: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [turn for turn in sample["messages"] if turn["role"] == "assistant"]


def _texts(turn: Mapping[str, Any]) -> list[str]:
    return [part["text"] for part in parts_of(turn) if part["type"] == "text"]


def _text(turn: Mapping[str, Any]) -> str:
    return "".join(_texts(turn))


def _named(sample: Mapping[str, Any]) -> str:
    return f"Sample {sample['index']} of the flow {sample['flow']!r}"

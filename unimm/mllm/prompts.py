"""Encoding of prompts to token ids, shared by training, chat, generation and evaluation.

A prompt is the output of the chat template. Control tokens (all added tokens of the text tokenizer, such as
`<|im_end|>` or `<|image_pad|>`) are tokens if the template wrote them, and plain characters inside user text. To tell
them apart, `mark_conversation` encloses those in user text in two private-use characters before the template is
rendered, and `encode` spells the enclosed strings. Text without control tokens is encoded in one piece.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from transformers import PreTrainedTokenizerBase

from unimm.data.characters import check_characters

START, END = "\U000f0000", "\U000f0001"  # the characters that transformers' `sanitize_control_tokens` takes
LONE = START  # a mark without a partner separates the text on its two sides
_UNREAD = frozenset({"image", "url", "path", "base64"})  # fields of an image part that never become text
_NEWLINE = "\n"


@dataclass
class Encoded:
    """Token ids [L] and their offsets in the text, (start, end) in characters; (0, 0) for a BOS token."""

    ids: list[int] = field(default_factory=list)
    offsets: list[tuple[int, int]] = field(default_factory=list)


def control_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Return a pattern that matches any control token: all added tokens except white space, longer ones first."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    tokens = sorted((token for token in added if token.strip()), key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, tokens)) or "(?!)")


def mark_text(text: str, pattern: re.Pattern[str]) -> str:
    """Mark the control tokens in user text.

    Raises:
        UserError: if the text contains half a character (a lone surrogate).
    """
    check_characters(text)
    return pattern.sub(f"{START}\\g<0>{END}", text.replace(START, "").replace(END, ""))


def mark_conversation(messages: Sequence[Any], pattern: re.Pattern[str]) -> list[Any]:
    """Mark the control tokens in every string of messages, tools or documents; images are left as is.

    Raises:
        UserError: if a text contains half a character.
    """
    marked = [mark_values(message, pattern) for message in messages]
    _part_neighbours([dict(message) for message in messages], marked, pattern)
    return marked


def mark_values(value: Any, pattern: re.Pattern[str]) -> Any:
    """Return a copy of `value` with the control tokens in its strings marked."""
    if isinstance(value, str):
        return mark_text(value, pattern)
    if isinstance(value, dict):
        return {key: each if key in _UNREAD else mark_values(each, pattern) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [mark_values(each, pattern) for each in value]
    return value


def _part_neighbours(messages: list[dict[str, Any]], marked: list[dict[str, Any]], pattern: re.Pattern[str]) -> None:
    """Put a lone mark between neighboring texts that would form a control token together; modifies `marked`."""
    places = [place for message in marked for place in _texts(message)]
    texts = [holder[key] for message in messages for holder, key in _texts(message)]
    whole, ends = "".join(texts), list(accumulate(map(len, texts)))
    if len(texts) < 2 or not pattern.search(whole):
        return
    for match in re.finditer(f"(?=({pattern.pattern}))", whole):
        for (holder, key), end in zip(places, ends, strict=True):
            if match.start(1) < end < match.end(1) and not holder[key].endswith(LONE):
                holder[key] += LONE


def _texts(message: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """Return the locations of a message's texts, in reading order: the dict and the key of each."""
    content = message.get("content")
    if isinstance(content, str):
        return [(message, "content")]
    parts = content if isinstance(content, list | tuple) else ()
    return [(part, "text") for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)]


def adds_begin_token(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the tokenizer itself prepends its BOS token to a text, as Llama's does."""
    begin = tokenizer.bos_token_id
    return begin is not None and tokenizer("").input_ids[:1] == [begin]


def encode(tokenizer: PreTrainedTokenizerBase, text: str, *, begin: bool, offsets: bool = False) -> Encoded:
    """Encode a rendered chat to token ids; marked control tokens are spelled in plain characters.

    Args:
        begin: prepend the BOS token.
        offsets: also return each token's offsets in the text, marks included; fast tokenizers only.

    Raises:
        UserError: if the text contains half a character.
    """
    check_characters(text)
    encoded = Encoded([tokenizer.bos_token_id], [(0, 0)]) if begin else Encoded()
    if START not in text and END not in text:
        _add(encoded, tokenizer, text, 0, offsets)
        return encoded
    pattern, place = control_pattern(tokenizer), 0
    for match in re.finditer(f"{START}({pattern.pattern}){END}|[{START}{END}]", text):
        _add(encoded, tokenizer, text[place : match.start()], place, offsets)
        if match[1] is not None:
            ids = _spelt(tokenizer, match[1])
            encoded.ids += ids
            encoded.offsets += [match.span()] * len(ids)
        place = match.end()
    _add(encoded, tokenizer, text[place:], place, offsets)
    return encoded


def padded(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Encoded], *, offsets: bool = False, **how: Any
) -> dict[str, Any]:
    """Pad the rows to a batch; `how` goes to the tokenizer's `pad`. The `offset_mapping` of padding is (0, 0)."""
    batch = dict(tokenizer.pad({"input_ids": [row.ids for row in rows]}, verbose=False, **how))
    if offsets:
        left = (how.get("padding_side") or tokenizer.padding_side) == "left"
        gaps = [[(0, 0)] * (len(ids) - len(row.ids)) for ids, row in zip(batch["input_ids"], rows, strict=True)]
        pairs = zip(gaps, rows, strict=True)
        batch["offset_mapping"] = [[*gap, *row.offsets] if left else [*row.offsets, *gap] for gap, row in pairs]
    return batch


def _add(encoded: Encoded, tokenizer: PreTrainedTokenizerBase, text: str, place: int, offsets: bool) -> None:
    """Append the tokens of a piece of text that begins at `place`."""
    if not text:
        return
    lead = _NEWLINE if place else ""  # keeps sentencepiece from adding its dummy prefix inside a text
    ids, spans = _tokens(tokenizer, lead + text, offsets)
    if lead:
        newline, _ = _tokens(tokenizer, lead, False)
        if ids[: len(newline)] == newline:
            ids, spans = ids[len(newline) :], spans[len(newline) :]
        else:  # the newline is part of the piece's first token
            lead = ""
            ids, spans = _tokens(tokenizer, text, offsets)
    encoded.ids += ids
    shift = place - len(lead)
    encoded.offsets += [(start + shift, end + shift) for start, end in spans]


def _tokens(
    tokenizer: PreTrainedTokenizerBase, text: str, offsets: bool
) -> tuple[list[int], Sequence[tuple[int, int]]]:
    output = tokenizer(text, add_special_tokens=False, return_offsets_mapping=offsets, verbose=False)
    return output["input_ids"], output["offset_mapping"] if offsets else ()


def _spelt(tokenizer: PreTrainedTokenizerBase, token: str) -> list[int]:
    """Return token ids that spell a control token's characters, none of them a control token."""
    control = set(tokenizer.added_tokens_decoder) - {tokenizer.unk_token_id}
    newline, ids = _spelling(tokenizer, _NEWLINE), _spelling(tokenizer, _NEWLINE + token)
    ids = ids[len(newline) :] if ids[: len(newline)] == newline else _spelling(tokenizer, token)
    if control.isdisjoint(ids):
        return ids
    # the tokenizer's model has the whole string in its vocabulary: encode one character at a time
    single = [each for character in token for each in _spelling(tokenizer, character)]
    return [each for each in single if each not in control]


def _spelling(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of a text, ignoring the added tokens."""
    if not tokenizer.is_fast:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return ids
    backend = tokenizer.backend_tokenizer  # `split_special_tokens` is shared state here and skips special tokens only
    text = backend.normalizer.normalize_str(text) if backend.normalizer else text
    pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)] if backend.pre_tokenizer else [text]
    return [token.id for piece in pieces for token in backend.model.tokenize(piece)]

"""Checks for lone surrogates (halves of a surrogate pair), which cannot be encoded by a tokenizer or in a file."""

import re

from unimm.errors import UserError

_LONE = re.compile("[\ud800-\udfff]")


def half_character(text: str) -> str | None:
    """Describe the first lone surrogate of a text and its position; return None if there is none."""
    found = _LONE.search(text)
    return None if found is None else f"U+{ord(found[0]):04X} at character {found.start() + 1} of {len(text)}"


def check_characters(text: str) -> None:
    """Raise UserError for a text with a lone surrogate, which truncated JSON escapes and bytes that are not UTF-8 leave
    behind."""
    if (half := half_character(text)) is not None:
        raise UserError(f"A text holds half a character ({half}), which cannot be encoded: remove it.")

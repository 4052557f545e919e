"""Characters that no tokenizer and no file can hold: halves of a surrogate pair."""

import re

from unimm.errors import UserError

_LONE = re.compile("[\ud800-\udfff]")


def half_character(text: str) -> str | None:
    """Say which half of a character the text holds and where; None for a text of whole characters."""
    found = _LONE.search(text)
    return None if found is None else f"U+{ord(found[0]):04X} at character {found.start() + 1} of {len(text)}"


def check_characters(text: str) -> None:
    """Raise UserError for a text with half a character in it, as cut-off JSON escapes and bytes that are no UTF-8
    leave behind."""
    if (half := half_character(text)) is not None:
        raise UserError(f"A text holds half a character ({half}), which cannot be encoded: remove it.")

"""Conversations in tables: a column of images and a column `messages` (or `conversations`).

| a turn is | its content |
|---|---|
| {"role", "content"} | a text, or a list of parts {"type": "text", "text": ...} and {"type": "image"} |
| {"from", "value"} | a text with `<image>`, as in LLaVA's files (`unimm.data.sources.llava`) |

The column may hold the list as a JSON string. The row's image replaces the image part of a question, or comes before
the first question if there is none. Anything else is a bad row.
"""

import json
from collections.abc import Mapping
from typing import Any

from PIL import Image

from unimm.data.bad_rows import BadRow, refuse_half_characters
from unimm.data.conversations import Message, RowsFlow
from unimm.data.shuffling import Rows
from unimm.data.sources.llava import ROLES, check_order, messages_of, parse_row
from unimm.errors import UserError

COLUMNS = ("messages", "conversations")
OWN_IMAGES = ("image", "url", "path", "base64", "image_url", "bytes")
"""Keys with which a part may bring its own image, which is not supported."""


class ConversationRows(Rows):
    """The rows of a table with parsed conversations: `messages` is a list of `Message`.

    Raises:
        UserError: there is no conversation column.
    """

    def __init__(self, rows: Rows, source: str) -> None:
        self.rows, self.source, self.column = rows, source, require_conversations(rows, source)
        self.blocks, self.pool, self.column_names = rows.blocks, rows.pool, rows.column_names

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        try:
            messages = read_messages(row[self.column], row["image"])
        except BadRow as bad:
            raise BadRow(bad.reason, f"row {row['key']} of {self.source}: {bad.detail}") from None
        return {**row, "messages": messages}


def require_conversations(rows: Rows, source: str) -> str:
    """Return the name of the conversation column. Raises UserError if there is none."""
    found = [name for name in COLUMNS if name in rows.column_names]
    if not found:
        raise UserError(
            f"{source} has no column {COLUMNS[0]!r} or {COLUMNS[1]!r}; its columns are "
            f"{', '.join(rows.column_names) or 'none'}."
        )
    return found[0]


class TableConversations(RowsFlow):
    """A flow over the conversations of `ConversationRows`, usually with bad rows skipped (`UsableRows`)."""

    def messages(self, index: int) -> list[Message]:
        return self.row(index)["messages"]


def read_messages(given: Any, image: Image.Image) -> list[Message]:
    """Return the conversation of a row about its image.

    Raises:
        BadRow: with the reason.
    """
    turns = _listed(given)
    if any(turn.get("from") is not None for turn in turns):
        return list(messages_of(parse_row({"image": "the row's own", "conversations": turns}), [image]))
    messages = [_message(turn, image) for turn in turns]
    check_order([message["role"] for message in messages])
    shown = [message["role"] for message in messages for part in message["content"] if part["type"] == "image"]
    if "assistant" in shown or "system" in shown:
        raise BadRow("image outside a question", f"an image stands in a turn of the {shown[0]}")
    if len(shown) > 1:
        raise BadRow("images do not match", f"the row has one image and its turns name {len(shown)}")
    if not shown:
        first = next(message for message in messages if message["role"] == "user")
        first["content"].insert(0, {"type": "image", "image": image})
    return messages


def _listed(given: Any) -> list[dict[str, Any]]:
    """Return the turns as a list of mappings."""
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError) as error:
            raise BadRow("not JSON", f"the conversation {given!r:.80} is not JSON: {error}") from None
    if isinstance(given, Mapping) and all(isinstance(values, list) for values in given.values()):
        lengths = {len(values) for values in given.values()}  # a list of structs may come as a struct of lists
        if len(lengths) == 1:
            given = [dict(zip(given, turn, strict=True)) for turn in zip(*given.values(), strict=True)]
    if not isinstance(given, list) or not given:
        raise BadRow("no conversation", f"{given!r:.80} is no list of turns")
    for turn in given:
        if not isinstance(turn, dict):
            raise BadRow("wrong turn", f"{turn!r:.80} is no turn with `role` and `content`, or `from` and `value`")
    return given


def _message(turn: dict[str, Any], image: Image.Image) -> Message:
    role, content = ROLES.get(str(turn.get("role")).lower()), turn.get("content")
    if role is None:
        raise BadRow("wrong turn", f"{turn!r:.80} has no `role` of user, assistant, system")
    if isinstance(content, str):
        refuse_half_characters(content, f"the {role}'s turn")
        return {"role": role, "content": [{"type": "text", "text": content}]}
    if not isinstance(content, list) or not content:
        raise BadRow("wrong turn", f"the {role}'s turn {turn!r:.80} has no text and no parts as `content`")
    return {"role": role, "content": [_part(part, image) for part in content]}


def _part(part: Any, image: Image.Image) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        refuse_half_characters(part["text"], "a part")
        return {"type": "text", "text": part["text"]}
    if kind == "image" and not part.get("index") and all(part.get(name) is None for name in OWN_IMAGES):
        return {"type": "image", "image": image}
    raise BadRow("wrong part", f'{part!r:.80} is no {{"type": "text", "text": ...}} and no {{"type": "image"}}')

"""Turns of a conversation in the chat format of transformers, with PIL images."""

from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image
from torch import Tensor

from unimm.data.characters import check_characters
from unimm.data.editing import edit_request
from unimm.data.images import each_image, read_image
from unimm.errors import UserError

ImageLike: TypeAlias = Image.Image | str | Path | np.ndarray | Tensor


def user_turn(text: str, images: ImageLike | Sequence[ImageLike] | None, what: str) -> dict[str, Any]:
    """Return a user's turn, its images before the text.

    Args:
        what: the word for the text in an error.

    Raises:
        UserError: if the text is empty or no text, or an image cannot be read.
    """
    if not isinstance(text, str):
        raise UserError(f"The {what} is a {type(text).__name__}, not text.")
    if not text.strip():
        raise UserError(f"The {what} is empty.")
    check_characters(text)
    return {"role": "user", "content": content([*map(read_image, each_image(images)), text])}


def edit_turn(text: str, image: ImageLike) -> dict[str, Any]:
    """Return the user's turn of an edit as training has it, see `unimm.data.editing.editing`.

    Raises:
        UserError: as `user_turn`.
    """
    shown, said = user_turn(text, image, "prompt")["content"]
    return edit_request(shown["image"], said["text"])


def image_turn(image: Image.Image) -> dict[str, Any]:
    """Return the user's turn of an edit without its instruction, as training drops it."""
    return {"role": "user", "content": content([image, ""])}


def content(parts: Sequence[str | Image.Image]) -> list[dict[str, Any]]:
    """Return texts and images as the content of a turn."""
    return [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part} for part in parts
    ]


def check_whole(name: str, value: Any, advice: str, least: int | None = None) -> None:
    """Raise UserError unless `value` is a whole number, not below `least`."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or (least is not None and value < least):
        raise UserError(f"{name} is {value!r}; {advice}.")

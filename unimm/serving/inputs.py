"""Messages of a request as a conversation of this package: texts, and images from data URLs, uploads or allowed hosts.

A path of a request is never opened: what is not a data URL, or a URL of an allowed host, is refused.
"""

import base64
import binascii
import io
from collections.abc import Sequence
from functools import partial
from typing import Any

from anyio import CapacityLimiter, to_thread
from PIL import Image

from unimm.data.characters import check_characters
from unimm.data.images import decode_image
from unimm.errors import UserError, shown
from unimm.mllm.answering import Conversation
from unimm.serving.remote_images import fetch
from unimm.serving.schemas import ImagePart, Message, TextPart
from unimm.serving.settings import ServingSettings

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Formats of Pillow that are decoded: its others are rare, and some start programs."""
_DECODERS = 2  # images decoded at once; each may take a few hundred MB for a moment


class InputReader:
    """Reads the texts and images of requests, within the limits of the settings."""

    def __init__(self, settings: ServingSettings) -> None:
        self.settings = settings
        self._limiter: CapacityLimiter | None = None  # belongs to the event loop of the first request

    async def conversation(self, messages: Sequence[Message]) -> Conversation:
        """Return the messages in the chat format of transformers, with PIL images.

        Raises:
            UserError: if a text or an image is refused, or there are too many of them.
        """
        images = [part.url for message in messages for part in _image_parts(message)]
        self.check_count(len(images))
        self.check_length(sum(len(text) for message in messages for text in _texts(message)))
        turns = []
        number = 0
        for message in messages:
            content: list[dict[str, Any]] = []
            for part in _parts(message):
                if isinstance(part, TextPart):
                    check_characters(part.text)
                    content.append({"type": "text", "text": part.text})
                else:
                    number += 1
                    content.append({"type": "image", "image": await self.image(part.url, f"number {number}")})
            role = "system" if message.role == "developer" else message.role
            if role == "system" and any(part["type"] == "image" for part in content):
                raise UserError("A system message is text: move its image into a message of the user.")
            turns.append({"role": role, "content": content})
        return turns

    def check_count(self, images: int) -> None:
        """Raise UserError if a request has too many images."""
        if images > self.settings.max_images:
            raise UserError(f"There are {images} images and the server takes {self.settings.max_images}: send fewer.")

    def check_length(self, characters: int) -> None:
        """Raise UserError if the texts of a request are too long."""
        if characters > self.settings.max_prompt:
            most = self.settings.max_prompt
            raise UserError(f"The text has {characters} characters and the server takes {most}: send less.")

    async def image(self, url: str, name: str) -> Image.Image:
        """Return the image of a data URL, or of a URL of an allowed host."""
        if url[:5].lower() == "data:":
            return await self.decoded(_data_of(url), name)
        if url.startswith(("http://", "https://")):
            if not self.settings.image_hosts:
                raise UserError("Images are not fetched from URLs here: send the image as a data URL.")
            load = partial(fetch, url, self.settings.image_hosts, self.settings.max_body)
            return await self.decoded(await to_thread.run_sync(load), name)
        raise UserError(f"An image is a data URL (data:image/png;base64,...), this is {shown(url[:40])}.")

    async def decoded(self, data: bytes, name: str) -> Image.Image:
        """Decode the bytes of an image file, a few images at a time."""
        if self._limiter is None:
            self._limiter = CapacityLimiter(_DECODERS)
        decode = partial(decode_image, data, name, check=self._check_size, formats=FORMATS)
        return await to_thread.run_sync(decode, limiter=self._limiter)

    async def mask(self, data: bytes, name: str) -> Image.Image:
        """Return a mask, white where the image is to be redrawn: OpenAI's are transparent there, ours are white."""
        plain = await self.decoded(data, name)
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:  # decoded above: it is whole, and not too large
            alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
        if alpha is None or alpha.getextrema()[0] == 255:
            return plain
        return alpha.point([255, *[0] * 255])

    def _check_size(self, size: tuple[int, int]) -> None:
        pixels = size[0] * size[1]
        if pixels > self.settings.max_image_pixels:
            most = self.settings.max_image_pixels
            raise UserError(f"An image has {size[0]} x {size[1]} pixels and the server takes {most}: make it smaller.")


def _data_of(url: str) -> bytes:
    """Return the bytes of a data URL."""
    head, comma, text = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise UserError("A data URL has the form data:image/png;base64,...: this one is not in base64.")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise UserError("The base64 text of a data URL is cut off or damaged.") from None


def _parts(message: Message) -> list[TextPart | ImagePart]:
    content = message.content
    if isinstance(content, str):
        content = [TextPart(type="text", text=content)]
    return [*(content or []), *(message.images or [])]


def _image_parts(message: Message) -> list[ImagePart]:
    return [part for part in _parts(message) if isinstance(part, ImagePart)]


def _texts(message: Message) -> list[str]:
    return [part.text for part in _parts(message) if isinstance(part, TextPart)]


def data_of(url: str) -> bytes:
    """Return the bytes of a data URL, the only kind of address of a mask."""
    if url[:5].lower() != "data:":
        raise UserError(f"A mask is a data URL (data:image/png;base64,...), this is {shown(url[:40])}.")
    return _data_of(url)


def image_to_edit(messages: Sequence[Message], anywhere: bool = False) -> str | None:
    """Return the address of the image in the last message of the user, or else, with `anywhere`, of the last image of
    the conversation; None if there is none.

    Raises:
        UserError: if the last message has several.
    """
    last = next((message for message in reversed(messages) if message.role == "user"), None)
    found = [] if last is None else _image_parts(last)
    if len(found) > 1:
        raise UserError(f"The message to draw has {len(found)} images and this model edits 1: send one.")
    if not found and anywhere:
        found = [part for message in messages for part in _image_parts(message)][-1:]
    return found[0].url if found else None


def last_prompt(messages: Sequence[Message]) -> str:
    """Return the text of the last message of the user, which is what is drawn.

    Raises:
        UserError: if there is none.
    """
    for message in reversed(messages):
        if message.role == "user":
            return "\n".join(_texts(message))
    raise UserError("There is no message of a user to draw: send one.")

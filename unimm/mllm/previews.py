"""Previews of images while they are generated: the images so far, every few rows, as a streamer or an iterator.

Image ids come row by row, so the first rows of an image can be decoded before the rest exists. A decoder attends to all
cells, so those that are not drawn yet need ids too: each column goes on with the id last drawn in it, as replicate
padding does, which keeps the drawn rows near what they become (with the embedded model on average 0.5 of 255 levels
from the final pixels, with random ids 1.7). The undrawn rows themselves are painted in a flat gray, so that nobody
takes the filling for the image. An image tokenizer whose ids do not correspond to patches (VFMTok) has no undrawn rows
of pixels; its previews are decoded in the same way and shown whole. S images, M image tokens.
"""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Self, TypeAlias

import torch
from PIL import Image
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from unimm.errors import UserError

OnToken: TypeAlias = Callable[[int, int], None]
"""Called with (image tokens done, image tokens of an image)."""
OnImage: TypeAlias = Callable[[list[Image.Image], int, int], None]
"""Called with (images so far, image tokens done, image tokens of an image)."""
PREVIEWS = 8  # of an image, if not said otherwise
_UNDRAWN = 0.5  # gray level of rows that are not drawn yet


@dataclass(frozen=True)
class Preview:
    """Images of which `done` of `total` image tokens are drawn; those of the last preview are `final`."""

    images: list[Image.Image]
    done: int
    total: int
    final: bool


class DrawingStreamer(BaseStreamer):
    """A streamer for `model.generate(generation_mode="image", streamer=...)` that reports tokens and images so far.

    Args:
        model, processor: from `unimm.load`.
        on_token: called after each image token.
        on_image: called after every `rows` rows of image tokens, and with the complete images, which are those of the
            returned ids, bit for bit. An exception that either of the two raises ends the generation.
        rows: rows of image tokens from one preview to the next; None: an eighth of the grid's rows.

    Attributes:
        images: the images of the latest preview.

    Raises:
        UserError: if `rows` is not a whole number from 1.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        on_token: OnToken | None = None,
        on_image: OnImage | None = None,
        rows: int | None = None,
    ) -> None:
        if rows is not None and (not isinstance(rows, int) or isinstance(rows, bool) or rows < 1):
            raise UserError(f"preview_rows is {rows!r}; give a whole number of rows of image tokens, at least 1.")
        self.model, self.processor = model, processor
        self.on_token, self.on_image = on_token, on_image
        self.height, self.width = model.config.image_grid
        self.rows = rows or max(1, self.height // PREVIEWS)
        self.drawn: list[Tensor] | None = None
        self.images: list[Image.Image] = []

    def put(self, value: Tensor) -> None:
        """Receive the prompts first, then the token ids [S] of one position after the other."""
        if self.drawn is None:
            self.drawn = []
            return
        self.drawn.append(value)
        done, total = len(self.drawn), self.height * self.width
        if self.on_token is not None:
            self.on_token(done, total)
        if self.on_image is not None and (done == total or done % (self.rows * self.width) == 0):
            self.images = images_so_far(self.model, self.processor, torch.stack(self.drawn, dim=1))
            self.on_image(self.images, done, total)

    def end(self) -> None:
        """Do nothing: the last token has been reported."""


@torch.no_grad()
def images_so_far(model: Any, processor: Any, token_ids: Tensor) -> list[Image.Image]:
    """Decode the first rows of images, token_ids [S, rows * grid width]; see the module for the rows that are missing.

    Raises:
        ValueError: if the last row is incomplete, or there is none.
    """
    height, width = model.config.image_grid
    rows, rest = divmod(token_ids.shape[1], width)
    if rest or not 1 <= rows <= height:
        raise ValueError(f"{token_ids.shape[1]} image tokens are no whole rows of a grid of {height} x {width}")
    filling = token_ids[:, -width:].repeat(1, height - rows)
    pixels = model.decode_image_tokens(torch.cat([token_ids, filling], dim=1))
    if model.image_tokenizer.ids_are_patches:
        pixels[:, :, pixels.shape[2] * rows // height :] = _UNDRAWN
    images: list[Image.Image] = processor.postprocess(pixels)
    return images


class PreviewStream(Iterator[Preview]):
    """An iterator over the previews of a generation that runs in a thread of its own.

    Closing it, from any thread, or dropping it ends the generation after the token that is being computed; `close`
    returns once the thread has ended. It is a context manager that closes itself.

    Args:
        draw: generates the images, with the two callbacks of `DrawingStreamer`, and returns them.
        on_final: called with the images before the final preview is returned.

    Raises:
        Exception: what `draw` raises, here if it fails before its first token, else from the iteration.
    """

    def __init__(
        self,
        draw: Callable[[OnToken, OnImage], list[Image.Image]],
        on_final: Callable[[list[Image.Image]], None] | None = None,
    ) -> None:
        self._events: SimpleQueue[Preview | Exception | None] = SimpleQueue()
        self._closed, self._on_final, self._over = threading.Event(), on_final, False
        # the thread must not hold this object, or it could not be dropped
        self._thread = threading.Thread(target=_generate, args=(draw, self._events, self._closed), daemon=True)
        self._thread.start()
        if isinstance(failure := self._events.get(), Exception):
            self._over = True
            raise failure

    def __next__(self) -> Preview:
        event = None if self._over or self._closed.is_set() else self._events.get()
        if event is None or self._closed.is_set():
            self._over = True
            raise StopIteration
        if isinstance(event, Exception):
            self._over = True
            raise event
        if event.final:
            self._over = True
            if self._on_final is not None:
                self._on_final(event.images)
        return event

    def close(self) -> None:
        """End the generation and the iteration."""
        self._closed.set()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self._closed.set()


class _Closed(Exception):
    """The stream was closed."""


def _generate(
    draw: Callable[[OnToken, OnImage], list[Image.Image]],
    events: "SimpleQueue[Preview | Exception | None]",
    closed: threading.Event,
) -> None:
    """Put None after the first token, then previews, the final one once `draw` has returned; an exception or, if
    closed, None ends them."""

    def on_token(done: int, total: int) -> None:
        if closed.is_set():
            raise _Closed
        if done == 1:
            events.put(None)

    def on_image(images: list[Image.Image], done: int, total: int) -> None:
        if done < total:
            events.put(Preview(images, done, total, False))
        else:
            totals.append(total)

    totals: list[int] = []
    try:
        images = draw(on_token, on_image)
        events.put(Preview(images, totals[0], totals[0], True))
    except _Closed:
        events.put(None)
    except Exception as error:  # raised again in the consumer's thread
        events.put(error)

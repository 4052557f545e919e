"""Requests to the engine, the events that answer them, and `Job`: a request on its way."""

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Generic, TypeAlias, TypeVar

import numpy as np
from PIL import Image

from unimm.data.conversations import message
from unimm.data.editing import edit_request
from unimm.mllm.answering import Conversation
from unimm.sampling import GuidanceScale, ImageSampling


@dataclass(frozen=True)
class TextRequest:
    """Ask for answers to a conversation.

    Args:
        messages: in the chat format of transformers, with PIL images.
        prompt_tokens: length of the prompt in tokens.
        max_new_tokens: longest answer.
        sampling: temperature, top_k, top_p; greedy is the most likely token each time.
        seed: answer k depends on (seed, k) only, not on the rest of the batch.
        n: number of answers.
        stop: an answer ends before the first of these texts.
        stream: whether to deliver a `Piece` for each new part of an answer.
    """

    messages: Conversation
    prompt_tokens: int
    max_new_tokens: int
    sampling: ImageSampling
    seed: int
    n: int = 1
    stop: tuple[str, ...] = ()
    stream: bool = False

    kind: ClassVar[str] = "text"

    @property
    def rows(self) -> int:
        """Return the number of sequences in a batch."""
        return self.n

    @property
    def row_tokens(self) -> int:
        """Return the length of a sequence when it is complete."""
        return self.prompt_tokens + self.max_new_tokens

    @property
    def batch_key(self) -> Hashable:
        """Return what requests of one batch have in common: conversations go with conversations."""
        return "text"

    @property
    def identity(self) -> Hashable:
        """Return None: answers depend on no other request."""
        return None

    @property
    def pixels(self) -> int:
        """Return the number of pixels of the images that this request keeps in memory."""
        parts = (part for message in self.messages for part in message["content"])
        return sum(part["image"].width * part["image"].height for part in parts if part["type"] == "image")


@dataclass(frozen=True)
class DrawRequest:
    """Ask for images of a prompt, or for an image edited by one.

    Args:
        prompt: text.
        prompt_tokens: length of the prompt in tokens.
        image_tokens: tokens of an image.
        sampling: the settings, with a single guidance scale (0: none), and one for the image if the model reads one.
        seed: image k depends on (seed, k) only, not on the rest of the batch.
        n: number of images.
        negative_prompt: text to guide away from; None is the checkpoint's null prompt.
        partial_images: number of `Preview`s to deliver before the images.
        image: the image to edit.
        reads_image: whether the model reads `image` with the prompt, which is an instruction then; else the prompt
            alone says what to draw in the cells `redrawn`.
        redrawn: cells [h, w] of the token grid that are redrawn; the others keep the tokens of `image`. None: all.
    """

    prompt: str
    prompt_tokens: int
    image_tokens: int
    sampling: ImageSampling
    seed: int
    n: int = 1
    negative_prompt: str | None = None
    partial_images: int = 0
    image: Image.Image | None = None
    reads_image: bool = True
    redrawn: np.ndarray | None = None

    kind: ClassVar[str] = "image"

    @property
    def guided(self) -> bool:
        """Return whether the images are guided by their prompt."""
        return _above_one(self.sampling.guidance_scale)

    @property
    def guided_by_image(self) -> bool:
        """Return whether the images are guided by the image to edit, too."""
        return _above_one(self.sampling.image_guidance_scale)

    @property
    def rows(self) -> int:
        """Return the number of sequences in a batch, those of the other sides of guidance included."""
        return self.n * (3 if self.guided_by_image else 1 + self.guided)

    @property
    def row_tokens(self) -> int:
        """Return the length of a sequence when it is complete."""
        return self.prompt_tokens + self.image_tokens + 1

    @property
    def batch_key(self) -> Hashable:
        """Return what requests of one batch have in common: all sampling settings but the guidance scale."""
        return "image", replace(self.sampling, guidance_scale=None), self.negative_prompt, self.redrawn is not None

    @property
    def identity(self) -> Hashable:
        """Return the prompt and the seed: `generate` counts equal ones of a batch as further images of the first."""
        return self.prompt, self.seed

    @property
    def pixels(self) -> int:
        """Return the number of pixels of the image that this request keeps in memory."""
        return 0 if self.image is None else self.image.width * self.image.height

    @property
    def messages(self) -> Conversation:
        """Return the prompt as a conversation, with the image to edit if the model reads it."""
        return [user_turn(self.prompt, self.image if self.reads_image else None)]


def _above_one(scale: GuidanceScale) -> bool:
    """Return whether a single scale is on."""
    return scale is not None and float(scale) > 1  # type: ignore[arg-type]


@dataclass(frozen=True)
class ReconstructRequest:
    """Ask for an image as its ids decode, and for the ids.

    Args:
        image: of any size.
        image_tokens: tokens of an image.
    """

    image: Image.Image
    image_tokens: int

    kind: ClassVar[str] = "reconstruction"
    rows: ClassVar[int] = 1
    batch_key: ClassVar[Hashable] = "reconstruction"
    identity: ClassVar[Hashable] = None

    @property
    def row_tokens(self) -> int:
        """Return the number of image tokens."""
        return self.image_tokens

    @property
    def pixels(self) -> int:
        """Return the number of pixels of the image that this request keeps in memory."""
        return self.image.width * self.image.height


Request: TypeAlias = TextRequest | DrawRequest | ReconstructRequest
AnyRequest = TypeVar("AnyRequest", bound=Request, covariant=True)


def user_turn(text: str, image: Image.Image | None = None) -> dict[str, Any]:
    """Return a message of a user in the chat format of transformers, an image to edit after its instruction."""
    return message("user", text) if image is None else edit_request(image, text)


@dataclass(frozen=True)
class Piece:
    """The next part of answer `row`."""

    row: int
    text: str


@dataclass(frozen=True)
class Preview:
    """Image `row` as far as it is drawn; `number` counts its previews from 0."""

    row: int
    number: int
    image: Image.Image


@dataclass(frozen=True)
class Written:
    """An answer, its length in tokens, and why it ended: "stop" or "length"."""

    text: str
    new_tokens: int
    finish_reason: str


@dataclass(frozen=True)
class Finished:
    """The last event: the answers of a `TextRequest` (`Written`), the images of a drawing, or a `Reconstruction`."""

    results: list[Any]


@dataclass(frozen=True)
class Failed:
    """The last event of a request that cannot be answered."""

    error: Exception


Event: TypeAlias = Piece | Preview | Finished | Failed


@dataclass(eq=False)
class Job(Generic[AnyRequest]):
    """A request on its way: waiting, running, or over.

    Args:
        deliver: receives the events, in the engine's thread; must not block.
    """

    request: AnyRequest
    deliver: Callable[[Event], None]
    arrived: float = field(default_factory=time.monotonic)
    cancelled: bool = False
    over: bool = False
    begun: bool = False
    """Whether an event has been delivered, after which the request cannot be run again."""

    @property
    def live(self) -> bool:
        """Return whether anyone still waits for events."""
        return not (self.over or self.cancelled)

    def send(self, event: Event) -> None:
        """Deliver an event unless nobody waits for it; `Finished` and `Failed` are the last."""
        if not self.live:
            return
        self.begun = True
        self.over = isinstance(event, Finished | Failed)
        try:
            self.deliver(event)
        except RuntimeError:  # the receiver's event loop has been closed
            self.cancelled = True

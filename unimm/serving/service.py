"""`Service`: what the routes share. It turns bodies into requests to the engine, within the limits of the settings."""

import logging
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from anyio import to_thread
from PIL import Image

from unimm.errors import UserError, printable
from unimm.mllm.answering import Conversation, drop_oldest
from unimm.mllm.conditions import redrawn_cells
from unimm.sampling import SAMPLING_NAMES, ImageSampling, per_prompt_scale
from unimm.serving.engine import Engine
from unimm.serving.errors import APIError
from unimm.serving.images_out import ImageFormat, ImageStore, check_size
from unimm.serving.inputs import InputReader
from unimm.serving.jobs import DrawRequest, ReconstructRequest, Request, TextRequest, Written, user_turn
from unimm.serving.metrics import Metrics
from unimm.serving.schemas import Body, Drawing, Sampling
from unimm.serving.settings import ServingSettings
from unimm.serving.streams import Answers

logger = logging.getLogger(__name__)

TEXT_SAMPLING = ("temperature", "top_k", "top_p")


@dataclass(frozen=True)
class Usage:
    """Tokens of a request: read as a prompt, and generated."""

    read: int
    generated: int


class Service:
    """The engine, the settings, and what belongs to one app."""

    def __init__(self, engine: Engine, settings: ServingSettings) -> None:
        self.engine, self.settings = engine, settings
        self.reader = InputReader(settings)
        self.store = ImageStore(settings.kept_images)
        self.metrics = Metrics()
        self.metrics.watch(engine)
        self.started = int(time.time())

    @property
    def model_names(self) -> list[str]:
        """Return the names under which the model is listed."""
        return list(dict.fromkeys([self.settings.model_name, *self.settings.aliases]))

    def model_name(self, body: Body) -> str:
        """Return the model's name as the client gave it, or its own; log what is ignored in the body.

        Raises:
            APIError: 404 if the server knows no such model.
        """
        body.log_ignored()
        name = body.model or self.settings.model_name
        if self.settings.aliases and name not in self.model_names:
            known = ", ".join(self.model_names)
            raise APIError(
                404, f"There is no model {printable(name)!r}: known are {known}.", code="model_not_found", param="model"
            )
        return name

    def submit(self, request: Request) -> Answers:
        """Submit a request to the engine."""
        return Answers(self.engine, request)

    async def recent(self, history: Conversation, question: dict[str, Any]) -> Conversation:
        """Return the history without what has no place in the model's context beside the question and an answer."""
        context = self.engine.context
        limit = context - min(self.settings.max_new_tokens, context // 8)
        return await to_thread.run_sync(drop_oldest, self.engine.processor, history, question, limit)

    def reconstruct_request(self, image: Image.Image) -> ReconstructRequest:
        """Return the request for an image as its ids decode."""
        height, width = self.engine.model.config.image_grid
        return ReconstructRequest(image, height * width)

    async def text_request(
        self,
        conversation: Conversation,
        body: Sampling,
        *,
        n: int | None = None,
        max_new_tokens: int | None = None,
        stop: Sequence[str] = (),
        stream: bool = False,
    ) -> TextRequest:
        """Return the request for answers to a conversation.

        Raises:
            APIError: if it does not fit the model's context.
            UserError: if a setting is invalid.
        """
        tokens = await self._count_tokens(conversation)
        room = self._room(tokens, 1)
        return TextRequest(
            messages=conversation,
            prompt_tokens=tokens,
            max_new_tokens=min(max_new_tokens or self.settings.max_new_tokens, room),
            sampling=self._text_sampling(body),
            seed=_seed(body.seed),
            n=self._count(n),
            stop=tuple(stop),
            stream=stream,
        )

    async def draw_request(
        self,
        prompt: str,
        body: Drawing,
        *,
        n: int | None = None,
        size: str | None = None,
        partial_images: int = 0,
        image: Image.Image | None = None,
        reads_image: bool = True,
        mask: Image.Image | None = None,
    ) -> DrawRequest:
        """Return the request for images of a prompt, or for an edited image.

        Raises:
            APIError: if the model does not draw, or the prompt does not fit its context.
            UserError: if a setting is invalid.
        """
        self.check_drawing(size)
        if not prompt.strip():
            raise UserError("The prompt is empty.")
        self.reader.check_length(len(prompt) + len(body.negative_prompt or ""))
        tokens = await self._count_tokens([user_turn(prompt, image if reads_image else None)])
        image_tokens = self.engine.model.num_image_tokens
        self._room(tokens, image_tokens + 1)
        if body.negative_prompt is not None:
            negative = await self._count_tokens([user_turn(body.negative_prompt)])
            self._room(negative, image_tokens + 1)
            tokens = max(tokens, negative)
        model, processor = self.engine.model, self.engine.processor
        redrawn = None if mask is None else await to_thread.run_sync(redrawn_cells, model, processor, mask)
        sampling, count = self._image_sampling(body, image is not None and reads_image), self._count(n)
        if count > 1 and sampling.greedy:
            raise UserError(f"{count} images with temperature 0 would be equal: ask for 1, or a temperature above 0.")
        return DrawRequest(
            prompt=prompt,
            prompt_tokens=tokens,
            image_tokens=image_tokens,
            sampling=sampling,
            seed=_seed(body.seed),
            n=count,
            negative_prompt=body.negative_prompt,
            partial_images=partial_images,
            image=image,
            reads_image=reads_image,
            redrawn=redrawn,
        )

    def check_drawing(self, size: str | None) -> None:
        """Raise an error if the model does not draw, or not in this size."""
        if not self.engine.can_draw:
            raise APIError(400, "This model does not draw images: ask it for text only.", code="unsupported_model")
        check_size(size, self.image_size)

    @property
    def image_size(self) -> int:
        """Return the width and height of drawn images."""
        return int(self.engine.model.image_tokenizer.config.image_size)

    @property
    def size_name(self) -> str:
        """Return the size of drawn images as OpenAI writes it."""
        return f"{self.image_size}x{self.image_size}"

    async def encoded(self, images: Sequence[Any], file_format: ImageFormat) -> list[str]:
        """Return images as base64 text."""
        return await to_thread.run_sync(lambda: [file_format.base64(image) for image in images])

    def written_usage(self, request: TextRequest, answers: Sequence[Written]) -> Usage:
        """Return and count the tokens of answers."""
        return self._counted(Usage(request.prompt_tokens, sum(answer.new_tokens for answer in answers)))

    def drawn_usage(self, request: DrawRequest) -> Usage:
        """Return and count the tokens of images."""
        return self._counted(Usage(request.prompt_tokens, request.n * request.image_tokens))

    def _counted(self, usage: Usage) -> Usage:
        self.metrics.count_tokens(usage.read, usage.generated)
        return usage

    async def _count_tokens(self, conversation: Conversation) -> int:
        return await to_thread.run_sync(partial(self.engine.processor.count_tokens, conversation))

    def _room(self, tokens: int, needed: int) -> int:
        """Return the tokens left for an answer; raise APIError if they are fewer than `needed`."""
        context = self.engine.context
        if tokens + needed > context:
            raise APIError(
                400,
                f"This is {tokens} tokens long, its answer needs {needed} at least, the model reads {context}: send "
                "less.",
                code="context_length_exceeded",
            )
        return context - tokens

    def _count(self, n: int | None) -> int:
        if n is not None and n > self.settings.max_n:
            raise UserError(f"n is {n} and the server takes {self.settings.max_n}: ask for fewer.")
        return n or 1

    def _text_sampling(self, body: Sampling) -> ImageSampling:
        """Return the sampling of text: the checkpoint's own without a temperature, greedy with temperature 0."""
        own = self.engine.model.generation_config
        given = _given(body, TEXT_SAMPLING)
        if body.temperature is None and not own.do_sample:
            return ImageSampling(do_sample=False)
        stored = {name: getattr(own, name, None) for name in TEXT_SAMPLING}
        return ImageSampling(**{name: value for name, value in {**stored, **given}.items() if value is not None})

    def _image_sampling(self, body: Drawing, edits: bool) -> ImageSampling:
        """Return the sampling of images: the checkpoint's own, overridden by what is given. Only edits are guided by
        their image."""
        own = ImageSampling.of(self.engine.model.generation_config, editing=edits)
        sampling = replace(own, **_given(body, SAMPLING_NAMES))
        scale = float(per_prompt_scale(sampling.guidance_scale, 1)[0])
        if (interval := sampling.guidance_interval) is not None:
            interval = (interval[0], interval[1])  # a checkpoint's is a list
        image_scale = sampling.image_guidance_scale if edits else None
        if image_scale is not None:
            image_scale = float(per_prompt_scale(image_scale, 1, "image_guidance_scale")[0])
        return replace(sampling, guidance_scale=scale, guidance_interval=interval, image_guidance_scale=image_scale)


def _given(body: Sampling, names: Sequence[str]) -> dict[str, Any]:
    """Return those of the settings `names` that a body has; top_k -1 is another way to say all."""
    given = {name: value for name in names if (value := getattr(body, name, None)) is not None}
    return given | {"top_k": max(given["top_k"], 0)} if "top_k" in given else given


def _seed(seed: int | None) -> int:
    return secrets.randbelow(2**31) if seed is None else seed

"""`ChatSession`: a multi-turn conversation with a unified model, with input and generated images.

Input and generated images stay in the history, so later questions may be about any of them; the oldest turns are
dropped once the conversation no longer fits the model's context. User text is never parsed for control tokens: markers
in it are encoded as plain characters. Run `python -m unimm.chat` for a chat in the terminal.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, Unpack, cast, overload

import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature

from unimm.chat.drawing import DrawingPlan, check_count, checked_seed, kept_outside_mask, kept_share
from unimm.chat.history import Exchange, History, Overflow
from unimm.chat.text_stream import text_pieces
from unimm.chat.turns import ImageLike, check_whole, edit_turn, image_turn, user_turn
from unimm.data.images import read_image
from unimm.errors import UserError
from unimm.mllm.answering import edit_inputs
from unimm.mllm.drawing import user_errors
from unimm.mllm.previews import OnImage, OnToken, PreviewStream
from unimm.sampling import SamplingOptions, sampling_options


class ChatSession(History):
    """A conversation. `messages` is its history in the chat format of transformers, with PIL images.

    Args:
        model, processor: from `unimm.load`.
        max_new_tokens: maximum length of an answer.
        overflow: what to do if the conversation exceeds the model's context: "drop" removes the oldest questions with
            their answers (never the system turn) and warns once; "refuse" raises.
        generation: arguments of `model.generate` in text mode (`do_sample`, `temperature`, ...), for every answer.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        max_new_tokens: int = 256,
        overflow: Overflow = "drop",
        **generation: Any,
    ) -> None:
        super().__init__(model, processor, overflow, {"max_new_tokens": max_new_tokens, **generation})

    @overload
    def ask(
        self, text: str, images: ImageLike | Sequence[ImageLike] | None = None, stream: Literal[False] = False
    ) -> str: ...
    @overload
    def ask(
        self, text: str, images: ImageLike | Sequence[ImageLike] | None = None, *, stream: Literal[True]
    ) -> Iterator[str]: ...
    def ask(
        self, text: str, images: ImageLike | Sequence[ImageLike] | None = None, stream: bool = False
    ) -> str | Iterator[str]:
        """Ask `text`, preceded by new images, and return the answer.

        Args:
            images: inputs of `unimm.data.images.read_image`: PIL images, paths, arrays, tensors; one, or a list of
                them. Images of earlier turns need not be passed again.
            stream: return an iterator over the pieces of the answer; the turn is added to the history once the
                iterator is exhausted or closed.

        Raises:
            UserError: if the text is empty, an image cannot be read, or the question (with `overflow="refuse"`: the
                conversation) does not fit the model's context. The history is then unchanged.
        """
        exchange, inputs = self._begin(user_turn(text, images, "question"), self._text_room)
        room = self._room(inputs, 1, "Reset the conversation or ask something shorter.")
        generation = {**self.generation, "max_new_tokens": min(self.generation["max_new_tokens"], room)}
        if stream:
            return text_pieces(
                self.model,
                self.processor.tokenizer,
                {**inputs, **generation},
                on_end=lambda answer: self._remember(exchange, [answer]),
            )
        sequence = self.model.generate(**inputs, **generation)
        answer = self.processor.decode(sequence[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        self._remember(exchange, [answer])
        return answer

    def draw(
        self,
        prompt: str,
        num_images: int = 1,
        seed: int | None = None,
        *,
        parallel_tokens: int | Literal["auto"] = 1,
        on_token: OnToken | None = None,
        on_image: OnImage | None = None,
        preview_rows: int | None = None,
        history: bool = False,
        variation_of: ImageLike | None = None,
        strength: float = 0.5,
        **sampling: Unpack[SamplingOptions],
    ) -> list[Image.Image]:
        """Generate images of `prompt`. Without `history`, the model is conditioned on this text alone.

        Args:
            seed: image k of a prompt depends on (seed, k) only; None uses a new seed each time.
            parallel_tokens: guess this many image tokens ahead, or "auto"; faster for few images, same result.
            on_token: called with (image tokens done, image tokens of an image) after each token.
            on_image: called with (images so far, image tokens done, image tokens of an image) every `preview_rows` rows
                of image tokens (None: an eighth of them), the last time with the images that are returned.
            history: condition on the whole conversation, its images included.
            variation_of: an image whose tokens are kept, except for a random share that is drawn anew.
            strength: this share, above 0 and at most 1.
            sampling: `guidance_scale`, `temperature`, ..., see `ImageSampling`; None uses the checkpoint's default.

        Raises:
            UserError: if the prompt is empty or too long for the model's context, or a setting is invalid.
        """
        plan = self._draw_plan(
            prompt,
            num_images,
            seed,
            parallel_tokens=parallel_tokens,
            history=history,
            variation_of=variation_of,
            strength=strength,
            **sampling,
        )
        return self._drawn(plan, on_token, on_image, preview_rows)

    def edit(
        self,
        prompt: str,
        image: ImageLike | None = None,
        mask: Any = None,
        *,
        num_images: int = 1,
        seed: int | None = None,
        strength: float | None = None,
        parallel_tokens: int | Literal["auto"] = 1,
        on_token: OnToken | None = None,
        on_image: OnImage | None = None,
        preview_rows: int | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> list[Image.Image]:
        """Edit an image by an instruction: the model is conditioned on both, and generates the edited image.

        Args:
            prompt: what to do, such as "make it blue".
            image: the source image; None takes the last image of the history, shown or generated.
            mask: what to redraw: an image of any size, white to redraw, or booleans [h, w] for the grid of image tokens
                (`unimm.mllm.conditions.mask_cells`). All other image tokens are those of the source image, bit for
                bit. They are drawn in raster order, so what is kept conditions only what comes after it.
            strength: without a mask, the share of image tokens to redraw, chosen at random; None draws all of them.
            sampling: `guidance_scale`, `image_guidance_scale`, `temperature`, ..., see `ImageSampling`; None uses the
                checkpoint's default.
            num_images, seed, parallel_tokens, on_token, on_image, preview_rows: as in `draw`.

        Raises:
            UserError: if there is no image, mask and image tokens do not match, or as in `draw`.
        """
        plan = self._edit_plan(
            prompt,
            image,
            mask,
            num_images=num_images,
            seed=seed,
            strength=strength,
            parallel_tokens=parallel_tokens,
            **sampling,
        )
        return self._drawn(plan, on_token, on_image, preview_rows)

    def draw_stream(
        self, prompt: str, num_images: int = 1, *, preview_rows: int | None = None, **settings: Any
    ) -> PreviewStream:
        """Generate images of `prompt` as `draw` does, and return an iterator of `Preview`s: the images so far.

        The last one is `final` and holds the images that `draw` returns; the history changes as it is returned. Closing
        or dropping the iterator before ends the generation and leaves the history.

        Args:
            preview_rows: rows of image tokens from one preview to the next; None: an eighth of them.
            settings: other arguments of `draw`, without its callbacks.

        Raises:
            UserError: as `draw`, before any preview.
        """
        return self._stream(self._draw_plan(prompt, num_images, **settings), preview_rows)

    def edit_stream(
        self,
        prompt: str,
        image: ImageLike | None = None,
        mask: Any = None,
        *,
        preview_rows: int | None = None,
        **settings: Any,
    ) -> PreviewStream:
        """Edit an image as `edit` does, and return an iterator of `Preview`s, see `draw_stream`.

        Args:
            image, mask: as in `edit`.
            preview_rows: rows of image tokens from one preview to the next; None: an eighth of them.
            settings: other arguments of `edit`, without its callbacks.

        Raises:
            UserError: as `edit`, before any preview.
        """
        return self._stream(self._edit_plan(prompt, image, mask, **settings), preview_rows)

    def respond(
        self,
        text: str,
        images: ImageLike | Sequence[ImageLike] | None = None,
        *,
        max_new_tokens: int | None = None,
        seed: int | None = None,
        parallel_tokens: int | Literal["auto"] = 1,
        **sampling: Unpack[SamplingOptions],
    ) -> list[str | Image.Image]:
        """Ask `text`, preceded by new images, and return an answer in which the model may draw: texts and PIL images.

        Args:
            images: as in `ask`.
            max_new_tokens: maximum length of the answer, its images included; None: the room in the context.
            seed: image k of the answer depends on (seed, k) only; None uses a new seed each time.
            parallel_tokens, sampling: of the images, as in `draw`.

        Raises:
            UserError: as `ask` and `draw`. The history is then unchanged.
        """
        question, settings = user_turn(text, images, "question"), sampling_options(cast(Mapping[str, Any], sampling))
        seed = checked_seed(seed)
        if max_new_tokens is not None:
            check_whole("max_new_tokens", max_new_tokens, "give a whole number of tokens")
        exchange, inputs = self._begin(question, self._text_room + self.model.num_image_tokens + 2)
        self._room(inputs, 1, "Reset the conversation or ask something shorter.")
        with user_errors():
            written = self.model.generate(
                **inputs,
                generation_mode="interleaved",
                **{**self.generation, "max_new_tokens": max_new_tokens},
                seed=seed,
                image_generation=settings,
                parallel_tokens=parallel_tokens,
            )
        answer = self._answer(written[:, inputs["input_ids"].shape[1] :])
        self._remember(exchange, answer)
        return answer

    def _answer(self, token_ids: Tensor) -> list[str | Image.Image]:
        """Return the texts and images of an interleaved answer, token_ids [1, L]."""
        (parts,) = self.processor.split_parts(token_ids)
        ids = [part["ids"] for part in parts if part["type"] == "image"]
        drawn: list[Image.Image] = []
        if ids:
            images = self.model.visual_vocabulary.token_ids(torch.stack(ids))
            drawn = self.processor.postprocess(self.model.decode_image_tokens(images))
        remaining = iter(drawn)
        return [part["text"] if part["type"] == "text" else next(remaining) for part in parts]

    def _draw_plan(
        self,
        prompt: str,
        num_images: int = 1,
        seed: int | None = None,
        *,
        parallel_tokens: int | Literal["auto"] = 1,
        history: bool = False,
        variation_of: ImageLike | None = None,
        strength: float = 0.5,
        **sampling: Unpack[SamplingOptions],
    ) -> DrawingPlan:
        """Return the drawing of a prompt, see `draw`."""
        request, settings = user_turn(prompt, None, "prompt"), sampling_options(cast(Mapping[str, Any], sampling))
        check_count(num_images)
        seed, forced = checked_seed(seed), None
        if history:
            exchange, inputs = self._begin(request, self.model.num_image_tokens + 1)
        else:
            exchange, inputs = Exchange(request), self._inputs([request])
        self._check_prompt(inputs, history)
        if variation_of is not None:
            source = read_image(variation_of)
            forced, seed = kept_share(self.model, self.processor, source, strength, seed, num_images)
        return DrawingPlan(exchange, inputs, num_images, seed, parallel_tokens, forced, settings)

    def _edit_plan(
        self,
        prompt: str,
        image: ImageLike | None = None,
        mask: Any = None,
        *,
        num_images: int = 1,
        seed: int | None = None,
        strength: float | None = None,
        parallel_tokens: int | Literal["auto"] = 1,
        **sampling: Unpack[SamplingOptions],
    ) -> DrawingPlan:
        """Return the drawing of an edit, see `edit`."""
        source = self._last_image() if image is None else read_image(image)
        if source is None:
            raise UserError("There is no image to edit: give one, or draw or show one first.")
        if mask is not None and strength is not None:
            raise UserError(f"strength={strength} and a mask both say what to redraw: leave one of them out.")
        request, settings = edit_turn(prompt, source), sampling_options(cast(Mapping[str, Any], sampling))
        # an image of the history is not remembered twice
        remembered = user_turn(prompt, None, "prompt") if image is None else request
        check_count(num_images)
        seed, forced = checked_seed(seed), None
        inputs = self._inputs([request])
        self._check_prompt(inputs)
        if mask is not None:
            forced = kept_outside_mask(self.model, self.processor, source, mask)
        elif strength is not None:
            forced, seed = kept_share(self.model, self.processor, source, strength, seed, num_images)
        inputs = edit_inputs(inputs, self._inputs([image_turn(source)]))
        return DrawingPlan(Exchange(remembered), inputs, num_images, seed, parallel_tokens, forced, settings)

    def _check_prompt(self, inputs: BatchFeature, history: bool = False) -> None:
        advice = "Reset the conversation or give a shorter prompt." if history else "Give a shorter prompt."
        self._room(inputs, self.model.num_image_tokens + 1, advice)

    def _drawn(
        self, plan: DrawingPlan, on_token: OnToken | None, on_image: OnImage | None, preview_rows: int | None
    ) -> list[Image.Image]:
        """Generate images and remember them."""
        images = plan.run(self.model, self.processor, on_token, on_image, preview_rows)
        self._remember(plan.exchange, images)
        return images

    def _stream(self, plan: DrawingPlan, preview_rows: int | None) -> PreviewStream:
        """Generate images in a thread; they are remembered with the final preview."""
        draw = partial(plan.run, self.model, self.processor, preview_rows=preview_rows)
        return PreviewStream(draw, on_final=partial(self._remember, plan.exchange))

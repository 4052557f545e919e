"""`ChatSession`: a multi-turn conversation with a unified model, with input and generated images.

Input and generated images stay in the history, so later questions may be about any of them; the oldest turns are
dropped once the conversation no longer fits the model's context. User text is never parsed for control tokens: markers
in it are encoded as plain characters. Run `python -m unimm.chat` for a chat in the terminal.
"""

import argparse
import io
import secrets
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, TypeAlias, Unpack, cast, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer
from transformers.utils import logging

from unimm.data.characters import check_characters
from unimm.data.image_files import save_numbered
from unimm.data.images import each_image, load_image, read_image
from unimm.errors import UserError, one_line, run_main
from unimm.mllm.answering import Conversation, chat_inputs, drop_oldest
from unimm.mllm.conditions import keep_outside, redrawn_cells, redrawn_share
from unimm.mllm.previews import DrawingStreamer, OnImage, OnToken, PreviewStream
from unimm.noise import image_seed
from unimm.sampling import SamplingOptions, sampling_options

logger = logging.get_logger(__name__)

ImageLike: TypeAlias = Image.Image | str | Path | np.ndarray | Tensor
Overflow = Literal["drop", "refuse"]
HELP = (
    "/image FILE shows an image, /draw PROMPT draws one, /edit PROMPT changes the last one, /reset forgets, /quit ends."
)


class ChatSession:
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
        if overflow not in ("drop", "refuse"):
            raise UserError(f"overflow is {overflow!r}; known are drop and refuse.")
        self.model, self.processor, self.overflow = model, processor, overflow
        self.generation = {"max_new_tokens": max_new_tokens, **generation}
        self.messages: Conversation = []
        self._said_dropped = False

    def reset(self) -> None:
        """Clear the history."""
        self.messages, self._said_dropped = [], False

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
        question = _user_turn(text, images, "question")
        history = self._kept(self.messages, question)
        inputs = self._inputs([*history, question])
        room = self._room(inputs, 1, "Reset the conversation or ask something shorter.")
        generation = {**self.generation, "max_new_tokens": min(self.generation["max_new_tokens"], room)}
        if stream:
            return self._stream(history, question, inputs, generation)
        sequence = self.model.generate(**inputs, **generation)
        answer = self.processor.decode(sequence[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        self._remember(history, question, [{"type": "text", "text": answer}])
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
        request = _user_turn(prompt, None, "prompt")
        _check_drawing(num_images, seed)
        settings = sampling_options(cast(Mapping[str, Any], sampling))
        streamer = self._streamer(on_token, on_image, preview_rows)
        kept = self._kept(self.messages, request, self.model.num_image_tokens + 1) if history else []
        inputs = self._inputs([*kept, request])
        forced = None
        if variation_of is not None:
            seed = secrets.randbelow(2**62) if seed is None else seed
            token_ids = self._token_ids(self._pixel_values(variation_of))
            forced = self._redrawn(token_ids, strength, seed, num_images)
        images = self._generated(inputs, num_images, seed, settings, parallel_tokens, streamer, forced)
        self._remember(kept if history else self.messages, request, _shown(images))
        return images

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
        if image is None:
            image = next((part["image"] for part in self._parts() if "image" in part), None)
            if image is None:
                raise UserError("There is no image to edit: give one, or draw or show one first.")
            remembered = _user_turn(prompt, None, "prompt")  # the image is in the history already
        else:
            image = read_image(image)
            remembered = _user_turn(prompt, image, "prompt")
        if mask is not None and strength is not None:
            raise UserError(f"strength={strength} and a mask both say what to redraw: leave one of them out.")
        request = _user_turn(prompt, image, "prompt")
        _check_drawing(num_images, seed)
        settings = sampling_options(cast(Mapping[str, Any], sampling))
        streamer = self._streamer(on_token, on_image, preview_rows)
        inputs: dict[str, Any] = dict(self._inputs([request]))
        forced = None
        if mask is not None or strength is not None:
            seed = secrets.randbelow(2**62) if seed is None else seed
            token_ids = self._token_ids(inputs["pixel_values"])
            forced = self._redrawn(token_ids, strength, seed, num_images, mask)
        alone = self._inputs([_image_turn(image)])
        extra = {"image_prompt_ids": alone["input_ids"], "image_prompt_attention_mask": alone["attention_mask"]}
        inputs = {**inputs, **extra}  # for `image_guidance_scale`
        images = self._generated(inputs, num_images, seed, settings, parallel_tokens, streamer, forced)
        self._remember(self.messages, remembered, _shown(images))
        return images

    def _generated(
        self,
        inputs: Mapping[str, Any],
        num_images: int,
        seed: int | None,
        settings: dict[str, Any],
        parallel_tokens: int | Literal["auto"],
        streamer: DrawingStreamer | None,
        forced: Tensor | None,
    ) -> list[Image.Image]:
        """Generate images of one prompt."""
        total = self.model.num_image_tokens
        self._room(inputs, total + 1, "Give a shorter prompt.")
        try:
            token_ids = self.model.generate(
                **inputs,
                generation_mode="image",
                num_return_sequences=num_images,
                seed=None if seed is None else int(seed),
                parallel_tokens=parallel_tokens,
                forced_token_ids=forced,
                streamer=streamer,  # on a GPU reports make every token wait
                **settings,
            )
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"Cannot draw: {one_line(error)}.") from error
        if streamer is not None and streamer.images:
            return streamer.images
        images: list[Image.Image] = self.processor.postprocess(self.model.decode_image_tokens(token_ids))
        return images

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
        trial = copy(self)  # its history is adopted with the final preview

        def draw(on_token: OnToken, on_image: OnImage) -> list[Image.Image]:
            return trial.draw(
                prompt, num_images, on_token=on_token, on_image=on_image, preview_rows=preview_rows, **settings
            )

        return PreviewStream(draw, on_final=lambda: vars(self).update(vars(trial)))

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
        question = _user_turn(text, images, "question")
        _check_drawing(1, seed)
        settings = sampling_options(cast(Mapping[str, Any], sampling))
        history = self._kept(self.messages, question, self._text_room() + self.model.num_image_tokens + 2)
        inputs = self._inputs([*history, question])
        self._room(inputs, 1, "Reset the conversation or ask something shorter.")
        written = self.model.generate(
            **inputs,
            generation_mode="interleaved",
            **{**self.generation, "max_new_tokens": max_new_tokens},
            seed=None if seed is None else int(seed),
            image_generation=settings,
            parallel_tokens=parallel_tokens,
        )
        (parts,) = self.processor.split_parts(written[:, inputs["input_ids"].shape[1] :])
        ids = [part["ids"] for part in parts if part["type"] == "image"]
        drawn: list[Image.Image] = []
        if ids:
            token_ids = self.model.visual_vocabulary.token_ids(torch.stack(ids))
            drawn = self.processor.postprocess(self.model.decode_image_tokens(token_ids))
        remaining = iter(drawn)
        answer = [part["text"] if part["type"] == "text" else next(remaining) for part in parts]
        self._remember(history, question, [_part(each) for each in answer])
        return answer

    def _streamer(self, on_token: OnToken | None, on_image: OnImage | None, rows: int | None) -> DrawingStreamer | None:
        streamer = DrawingStreamer(self.model, self.processor, on_token=on_token, on_image=on_image, rows=rows)
        return None if on_token is None and on_image is None else streamer

    def _parts(self) -> Iterator[dict[str, Any]]:
        """Yield the parts of all messages, the last first."""
        for message in reversed(self.messages):
            if not isinstance(message["content"], str):
                yield from reversed(message["content"])

    def _pixel_values(self, image: ImageLike) -> Tensor:
        found: Tensor = self.processor.image_processor([read_image(image)], return_tensors="pt")["pixel_values"]
        return found

    def _token_ids(self, pixel_values: Tensor) -> Tensor:
        """Return the image tokens [1, M] of a source image."""
        token_ids: Tensor = self.model.get_image_tokens(pixel_values.to(self.model.device, self.model.dtype)).cpu()
        return token_ids

    def _redrawn(self, token_ids: Tensor, strength: Any, seed: int, num_images: int, mask: Any = None) -> Tensor:
        """Return the forced token ids [num_images, M] of a source image [1, M]."""
        if mask is None:
            seeds = [image_seed(int(seed), k) for k in range(num_images)]
            return keep_outside(token_ids, redrawn_share(strength, seeds, token_ids.shape[1]))
        cells = torch.from_numpy(redrawn_cells(self.model, self.processor, mask))
        return keep_outside(token_ids, cells.flatten().expand(num_images, -1))

    def _inputs(self, messages: Conversation) -> BatchFeature:
        return chat_inputs(self.model, self.processor, [messages])

    def _kept(self, history: Conversation, question: dict[str, Any], room: int | None = None) -> Conversation:
        """Drop the oldest exchanges until history, question and an answer of `room` tokens (None: text) fit the
        context, image tokens included."""
        if self.overflow == "refuse":
            return history
        context = self.model.config.get_text_config().max_position_embeddings
        return drop_oldest(self.processor, history, question, context - (self._text_room() if room is None else room))

    def _text_room(self) -> int:
        context: int = self.model.config.get_text_config().max_position_embeddings
        return min(self.generation["max_new_tokens"], context // 8)

    def _room(self, inputs: Mapping[str, Any], needed: int, advice: str) -> int:
        """Return the number of tokens left for the answer; raise UserError if it is less than `needed`."""
        length = inputs["input_ids"].shape[1]
        context = self.model.config.get_text_config().max_position_embeddings
        if length + needed > context:
            raise UserError(
                f"This is {length} tokens long, its answer needs {needed} at least, the model reads {context}. {advice}"
            )
        return context - length

    def _remember(self, history: Conversation, question: dict[str, Any], answer: list[dict[str, Any]]) -> None:
        if (dropped := len(self.messages) - len(history)) > 0 and not self._said_dropped:
            self._said_dropped = True
            context = self.model.config.get_text_config().max_position_embeddings
            logger.warning(
                f"The conversation is longer than the {context} tokens that the model reads: its {dropped} oldest "
                "turns are forgotten, as further ones will be without a word."
            )
        self.messages = [*history, question, {"role": "assistant", "content": answer}]

    def _stream(
        self, history: Conversation, question: dict[str, Any], inputs: BatchFeature, generation: dict[str, Any]
    ) -> Iterator[str]:
        """Yield pieces of the answer while a thread generates it; the thread ends with the iterator."""
        pieces = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        closed = _Closed()
        failures: list[Exception] = []

        def write() -> None:
            try:
                self.model.generate(
                    **inputs, **generation, streamer=pieces, stopping_criteria=StoppingCriteriaList([closed])
                )
            except Exception as error:  # raised again in the consumer's thread
                failures.append(error)
                pieces.end()

        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        said: list[str] = []
        try:
            for piece in pieces:
                said.append(piece)
                if piece:
                    yield piece
        finally:
            closed.event.set()
            writer.join()
            if not failures:
                self._remember(history, question, [{"type": "text", "text": "".join(said)}])
        if failures:
            raise failures[0]


class _Closed(StoppingCriteria):
    """A stopping criterion that ends generation once the stream is closed."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return input_ids.new_full((len(input_ids),), self.event.is_set()).bool()


def _check_drawing(num_images: Any, seed: Any) -> None:
    """Raise UserError for an invalid number of images, or an invalid seed."""
    if not _whole(num_images) or num_images < 1:
        raise UserError(f"num_images is {num_images!r}; ask for at least 1 image, in whole numbers.")
    if seed is not None and not _whole(seed):
        raise UserError(f"seed is {seed!r}; give a whole number.")


def _image_turn(image: Image.Image) -> dict[str, Any]:
    """Return the user turn of an edit without its instruction, as training drops it."""
    return {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": ""}]}


def _shown(images: Sequence[Image.Image]) -> list[dict[str, Any]]:
    """Return the content of an answer of images."""
    return [{"type": "image", "image": image} for image in images]


def _whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _user_turn(text: str, images: ImageLike | Sequence[ImageLike] | None, what: str) -> dict[str, Any]:
    if not isinstance(text, str):
        raise UserError(f"The {what} is a {type(text).__name__}, not text.")
    if not text.strip():
        raise UserError(f"The {what} is empty.")
    check_characters(text)
    content: list[str | Image.Image] = [*map(read_image, each_image(images)), text]
    return {"role": "user", "content": [_part(each) for each in content]}


def _part(content: str | Image.Image) -> dict[str, Any]:
    return {"type": "text", "text": content} if isinstance(content, str) else {"type": "image", "image": content}


def converse(session: ChatSession, images: Sequence[ImageLike] = ()) -> None:
    """Read lines from standard input until it ends or `/quit`. A `UserError` is printed and the chat continues."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(
            errors="surrogateescape"
        )  # a line that is not UTF-8 becomes a UserError instead of ending the chat
    interactive = sys.stdin.isatty()
    if interactive:
        print(HELP, file=sys.stderr)
    pending = list(images)
    while True:
        if interactive:
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        word, _, rest = line.strip().partition(" ")
        if not line or word == "/quit":
            return
        try:
            if word == "/image":
                pending.append(load_image(rest.strip()))
            elif word == "/draw":
                (path,) = save_numbered(session.draw(rest.strip()), "picture.png")
                print(path)
            elif word == "/edit":
                (path,) = save_numbered(session.edit(rest.strip(), pending[-1] if pending else None), "picture.png")
                print(path)
                pending = pending[:-1]
            elif word == "/reset":
                session.reset()
                pending = []
            elif word.startswith("/"):
                raise UserError(f"There is no command {word}: {HELP}")
            elif word:
                for piece in session.ask(line.strip(), pending, stream=True):
                    print(piece, end="", flush=True)
                print()
                pending = []
        except UserError as error:
            print(f"unimm: {one_line(error)}", file=sys.stderr)


def main() -> None:
    """Run `python -m unimm.chat [--model PATH] [--image FILE ...]`."""
    from unimm.mllm import load

    parser = argparse.ArgumentParser(prog="python -m unimm.chat", description="Talk with a unified model about images.")
    parser.add_argument("--model", help="a unified model; the default comes with the library")
    parser.add_argument("--image", action="append", default=[], type=Path, help="an image to begin with")
    arguments = parser.parse_args()
    images = [load_image(path) for path in arguments.image]
    converse(ChatSession(*load(arguments.model)), images)


if __name__ == "__main__":
    sys.exit(run_main(main, name="chat"))

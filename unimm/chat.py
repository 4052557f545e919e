"""`ChatSession`: a conversation with a unified model, in which both sides show pictures.

Special here: pictures stay in the history, the user's and the drawn ones, so later questions may be about any of
them. What a user types
is text only: markers in it are encoded as plain characters. `python -m unimm.chat` talks at the terminal.
"""

import argparse
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, overload

from PIL import Image
from torch import Tensor
from transformers import BatchFeature, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer

from unimm.data.images import load_image, save_image_atomically, to_rgb
from unimm.errors import UserError, one_line, run_main
from unimm.mllm.answering import Conversation, chat_inputs

Picture = Image.Image | str | Path
HELP = "/image FILE shows a picture, /draw PROMPT draws one, /reset forgets, /quit ends."


class ChatSession:
    """A conversation. `messages` is its history in the chat format of transformers, pictures as PIL images in it.

    Args:
        model, processor: as `unimm.load` gives them.
        max_new_tokens: longest answer.
        generation: of `model.generate` in text mode (`do_sample`, `temperature`, ...), for every answer.
    """

    def __init__(self, model: Any, processor: Any, *, max_new_tokens: int = 256, **generation: Any) -> None:
        self.model, self.processor = model, processor
        self.generation = {"max_new_tokens": max_new_tokens, **generation}
        self.messages: Conversation = []

    def reset(self) -> None:
        """Forget everything said and shown."""
        self.messages = []

    @overload
    def ask(
        self, text: str, images: Picture | Sequence[Picture] | None = None, stream: Literal[False] = False
    ) -> str: ...
    @overload
    def ask(
        self, text: str, images: Picture | Sequence[Picture] | None = None, *, stream: Literal[True]
    ) -> Iterator[str]: ...
    def ask(
        self, text: str, images: Picture | Sequence[Picture] | None = None, stream: bool = False
    ) -> str | Iterator[str]:
        """Say `text`, with new pictures before it, and get the answer.

        Args:
            images: PIL images or paths; earlier ones need not be given again.
            stream: give the answer as an iterator of its pieces; the turn is in the history once the iterator is
                used up or closed.

        Raises:
            UserError: nothing was asked, a picture cannot be read, or the conversation no longer fits the model's
                context. The history is then as before.
        """
        question = _user_turn(text, images, "question")
        inputs = self._inputs([*self.messages, question])
        room = self._room(inputs, 1, "Reset the conversation or ask something shorter.")
        generation = {**self.generation, "max_new_tokens": min(self.generation["max_new_tokens"], room)}
        if stream:
            return self._stream(question, inputs, generation)
        sequence = self.model.generate(**inputs, **generation)
        answer = self.processor.decode(sequence[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        self._remember(question, [{"type": "text", "text": answer}])
        return answer

    def draw(
        self,
        prompt: str,
        num_images: int = 1,
        seed: int | None = None,
        guidance_scale: float | None = None,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        parallel_tokens: int | Literal["auto"] = 1,
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[Image.Image]:
        """Draw `prompt`, which stands for itself: the model draws from this text alone, not from the history.

        Args:
            seed: image k of a prompt depends on (seed, k) only; None draws a new one each time.
            guidance_scale: how strongly the picture follows the prompt; 0 or 1 is off. None here and below: the
                checkpoint's own.
            temperature: of the choice of image tokens, 0 for the likeliest each time.
            top_k, top_p: choose among the k likeliest, or the likeliest that hold this share of the probability.
            parallel_tokens: guess so many image tokens ahead, or "auto"; faster for few images, the same image.
            on_token: called with (image tokens done, image tokens of a picture) after each step.

        Raises:
            UserError: an empty prompt, one longer than the model's context leaves room for, or settings without a
                meaning.
        """
        request = _user_turn(prompt, None, "prompt")
        if num_images < 1:
            raise UserError(f"num_images is {num_images}; ask for at least 1 picture.")
        total = self.model.num_image_tokens
        inputs = self._inputs([request])
        self._room(inputs, total + 1, "Give a shorter prompt.")
        settings = {"guidance_scale": guidance_scale, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        try:
            token_ids = self.model.generate(
                **inputs,
                generation_mode="image",
                num_return_sequences=num_images,
                seed=seed,
                parallel_tokens=parallel_tokens,
                streamer=None if on_token is None else _Progress(on_token, total),
                **{name: value for name, value in settings.items() if value is not None},
            )
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"Cannot draw: {one_line(error)}.") from error
        pictures = self.processor.postprocess(self.model.decode_image_tokens(token_ids))
        self._remember(request, [{"type": "image", "image": picture} for picture in pictures])
        return pictures

    def _inputs(self, messages: Conversation) -> BatchFeature:
        return chat_inputs(self.model, self.processor, [messages])

    def _room(self, inputs: BatchFeature, needed: int, advice: str) -> int:
        """Tokens left for the answer; at least `needed`."""
        length = inputs["input_ids"].shape[1]
        context = self.model.config.get_text_config().max_position_embeddings
        if length + needed > context:
            raise UserError(
                f"This is {length} tokens long, its answer needs {needed} at least, the model reads {context}. {advice}"
            )
        return context - length

    def _remember(self, question: dict[str, Any], answer: list[dict[str, Any]]) -> None:
        self.messages = [*self.messages, question, {"role": "assistant", "content": answer}]

    def _stream(self, question: dict[str, Any], inputs: BatchFeature, generation: dict[str, Any]) -> Iterator[str]:
        """Pieces of the answer while it is written, in a thread of its own that ends with the iterator."""
        pieces = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        closed = _Closed()
        failures: list[Exception] = []

        def write() -> None:
            try:
                self.model.generate(
                    **inputs, **generation, streamer=pieces, stopping_criteria=StoppingCriteriaList([closed])
                )
            except Exception as error:  # raised again where the pieces are read
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
                self._remember(question, [{"type": "text", "text": "".join(said)}])
        if failures:
            raise failures[0]


class _Closed(StoppingCriteria):
    """Stops writing when nobody reads any more."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return input_ids.new_full((len(input_ids),), self.event.is_set()).bool()


class _Progress(BaseStreamer):
    """Counts steps; the first thing put is the prompt."""

    def __init__(self, on_token: Callable[[int, int], None], total: int) -> None:
        self.on_token, self.total, self.done = on_token, total, -1

    def put(self, value: Tensor) -> None:
        self.done += 1
        if self.done:
            self.on_token(self.done, self.total)

    def end(self) -> None:
        pass


def _user_turn(text: str, images: Picture | Sequence[Picture] | None, what: str) -> dict[str, Any]:
    if not text.strip():
        raise UserError(f"The {what} is empty.")
    given = [] if images is None else [images] if isinstance(images, Image.Image | str | Path) else list(images)
    shown = [to_rgb(each) if isinstance(each, Image.Image) else load_image(each) for each in given]
    parts = [{"type": "image", "image": picture} for picture in shown]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def converse(session: ChatSession, images: Sequence[Picture] = ()) -> None:
    """Read lines from standard input until it ends or `/quit`. A `UserError` is said, and the talk goes on."""
    interactive = sys.stdin.isatty()
    if interactive:
        print(HELP, file=sys.stderr)
    pending, drawn = list(images), 0
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
                (picture,) = session.draw(rest.strip())
                drawn += 1
                print(save_image_atomically(picture, f"picture-{drawn}.png"))
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
    """`python -m unimm.chat [--model PATH] [--image FILE ...]`."""
    from unimm.mllm import load

    parser = argparse.ArgumentParser(
        prog="python -m unimm.chat", description="Talk with a unified model about pictures."
    )
    parser.add_argument("--model", help="a unified model; the default comes with the library")
    parser.add_argument("--image", action="append", default=[], type=Path, help="a picture to begin with")
    arguments = parser.parse_args()
    images = [load_image(path) for path in arguments.image]
    converse(ChatSession(*load(arguments.model)), images)


if __name__ == "__main__":
    sys.exit(run_main(main, name="chat"))

"""What the page's buttons do: chat, draw, edit, reconstruct, all through the server's engine and within its limits."""

import io
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import gradio as gr
import numpy as np
from anyio import to_thread
from PIL import Image

from unimm.data.characters import check_characters
from unimm.errors import UserError
from unimm.mllm.answering import Conversation
from unimm.sampling import ImageSampling
from unimm.serving.errors import as_api_error
from unimm.serving.inputs import FORMATS
from unimm.serving.jobs import DrawRequest, Finished, Piece, Preview, user_turn
from unimm.serving.schemas import Drawing, Sampling
from unimm.serving.service import Service
from unimm.serving.web_files import saved

DRAW = ("draw", "/draw")
"""First words of a message that asks for an image."""
DESCRIBE, INSTRUCT = "Describe the finished image", "Say what to change"
"""How the text of an edit is meant."""
_WAITING = "…"
_KEPT_SIDE = 1024  # pixels

Drawn: TypeAlias = tuple[list[Image.Image], str]
"""Images, as far as they are drawn, and the line below them."""


@dataclass(frozen=True)
class Talk:
    """A conversation as the model reads it, and as the page shows it."""

    messages: Conversation = field(default_factory=list)
    shown: list[dict[str, Any]] = field(default_factory=list)


ChatStep: TypeAlias = tuple[Any, list[dict[str, Any]], Talk]
"""An update of the text box, the conversation as it is shown, and the conversation."""


class Actions:
    """The page's functions. What goes wrong is raised as one sentence, `gr.Error`."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def chat(
        self, message: dict[str, Any], talk: Talk
    ) -> AsyncGenerator[tuple[Any, list[dict[str, Any]], Talk], None]:
        """Yield the text box, the conversation as it is shown, and the conversation.

        Args:
            message: its "text", and the paths of its "files". A text that begins with "draw" asks for an image.
        """
        text, files = (message["text"] or "").strip(), message["files"]
        word, _, rest = text.partition(" ")
        answer: list[Any] = [_WAITING]
        try:
            self.service.reader.check_count(len(files))
            images = [await self._image(Path(path).read_bytes()) for path in files]
            for image in images:
                image.thumbnail((_KEPT_SIDE, _KEPT_SIDE))  # they stay in memory as long as the conversation
            question = _question(text, images)
            shown = [*talk.shown, {"role": "user", "content": [*map(_shown, files), text]}]
            history = await self.service.recent(talk.messages, question)
            yield text_box(None, busy=True), [*shown, _answer(answer)], talk
            if word.lower() in DRAW:
                if images:
                    raise UserError(f"There are {len(images)} images beside what to draw: change one in the tab Edit.")
                request = await self.service.draw_request(rest, Drawing(), partial_images=self._previews)
                async with aclosing(self._draw(request)) as stream:
                    async for drawn, _ in stream:
                        answer = [_shown(saved(drawn[0]))]
                        yield gr.skip(), [*shown, _answer(answer)], talk
                reply: dict[str, Any] = {"type": "image", "image": drawn[0]}
            else:
                async with aclosing(self._write([*history, question])) as pieces:
                    async for written in pieces:
                        answer = [written]
                        yield gr.skip(), [*shown, _answer(answer)], talk
                reply = {"type": "text", "text": written}
        except Exception as error:
            yield text_box(message), talk.shown, talk
            raise _sentence(error) from None
        messages = [*history, question, {"role": "assistant", "content": [reply]}]
        shown = [*shown, _answer(answer)]
        yield text_box(None), shown, Talk(messages, shown)

    async def draw(
        self, prompt: str, number: str, seed: str | None, guidance: float, temperature: float
    ) -> AsyncGenerator[Drawn, None]:
        """Yield images of a prompt while they are drawn."""
        with told():
            body = _drawing(seed, guidance, temperature)
            request = await self.service.draw_request(prompt, body, n=int(number), partial_images=self._previews)
            async with aclosing(self._draw(request)) as stream:
                async for drawn in stream:
                    yield drawn

    async def edit(
        self,
        painted: dict[str, Any],
        prompt: str,
        meaning: str,
        seed: str | None,
        guidance: float,
        temperature: float,
    ) -> AsyncGenerator[Drawn, None]:
        """Yield an edited image while it is drawn.

        Args:
            painted: the bytes of the "background" and of the "layers" painted over it, which say what to redraw.
            meaning: of the prompt, `DESCRIBE` or `INSTRUCT`.
        """
        with told():
            if painted is None or painted["background"] is None:
                raise UserError("There is no image: drop one here, or take an example.")
            image = await self._image(painted["background"])
            for layer in painted["layers"]:
                await self._image(layer)  # within the limits
            mask = await to_thread.run_sync(mask_of, painted["layers"])
            if mask is None and meaning == DESCRIBE:
                raise UserError("Nothing is painted: paint over the part to draw anew.")
            request = await self.service.draw_request(
                prompt,
                _drawing(seed, guidance, temperature),
                partial_images=self._previews,
                image=image,
                reads_image=meaning == INSTRUCT,
                mask=mask,
            )
            async with aclosing(self._draw(request)) as stream:
                async for drawn in stream:
                    yield drawn

    async def reconstruct(self, data: bytes | None) -> tuple[Image.Image, Image.Image, Image.Image, str]:
        """Return an image as the model receives it, its reconstruction, its code map, and a line about them."""
        with told():
            if data is None:
                raise UserError("There is no image: drop one here, or take an example.")
            request = self.service.reconstruct_request(await self._image(data))
            async with aclosing(self.service.submit(request).events()) as events:
                async for event in events:
                    if isinstance(event, Finished):
                        (result,) = event.results
            used = len(np.unique(result.ids))
            line = (
                f"**{result.ids.size}** codes stand for this image, **{used}** of them different, out of "
                f"{result.codebook_size:,} in the codebook. PSNR **{result.psnr:.1f} dB**; higher is closer."
            )
            return result.original, result.image, code_map(result.codes, result.image.size), line

    def sampling(self, *, editing: bool = False) -> ImageSampling:
        """Return the checkpoint's own sampling of images, or of edits."""
        return ImageSampling.of(self.service.engine.model.generation_config, editing=editing)

    @property
    def _previews(self) -> int:
        """Return the number of previews of an image: one for each row of image tokens, 16 at most."""
        return min(int(self.service.engine.model.config.image_grid[0]) - 1, 16) if self.service.engine.can_draw else 0

    async def _image(self, data: bytes) -> Image.Image:
        return await self.service.reader.decoded(data, "that was uploaded")

    async def _draw(self, request: DrawRequest) -> AsyncGenerator[Drawn, None]:
        """Yield the images of a request as far as they are drawn, and at last complete."""
        start = time.monotonic()
        images: dict[int, Image.Image] = {}
        async with aclosing(self.service.submit(request).events()) as events:
            async for event in events:
                if isinstance(event, Preview):
                    images[event.row] = event.image
                    if event.row == request.n - 1:
                        yield [images[row] for row in range(request.n)], "Drawing…"
                elif isinstance(event, Finished):
                    self.service.drawn_usage(request)
                    yield event.results, f"Seed {request.seed} · {time.monotonic() - start:.1f} s"

    async def _write(self, conversation: Conversation) -> AsyncGenerator[str, None]:
        """Yield the answer to a conversation as far as it is written."""
        request = await self.service.text_request(conversation, Sampling(), stream=True)
        text = ""
        async with aclosing(self.service.submit(request).events()) as events:
            async for event in events:
                if isinstance(event, Piece):
                    text += event.text
                    yield text
                elif isinstance(event, Finished):
                    self.service.written_usage(request, event.results)
                    yield event.results[0].text.strip() or "(no answer)"


def text_box(message: dict[str, Any] | None, *, busy: bool = False) -> Any:
    """Return the update of the chat's text box: what it holds, and whether it can send or stop."""
    return gr.update(value=message or {"text": "", "files": []}, submit_btn=not busy, stop_btn=busy)


@contextmanager
def told() -> Iterator[None]:
    """Raise what goes wrong as one sentence for the page."""
    try:
        yield
    except Exception as error:
        raise _sentence(error) from None


def mask_of(layers: list[bytes]) -> Image.Image | None:
    """Return what is painted in the layers of an editor as an image, white on black; None if nothing is."""
    painted: np.ndarray | None = None
    for layer in layers:
        alpha = np.asarray(Image.open(io.BytesIO(layer), formats=FORMATS).convert("RGBA"))[..., 3] > 0
        painted = alpha if painted is None else painted | alpha
    return None if painted is None or not painted.any() else Image.fromarray(painted.astype(np.uint8) * 255)


def code_map(codes: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """Draw codes [h, w, C] as an image of `size`: equal codes have equal colors, similar codes similar ones.

    The colors are the first three principal components of the image's own codes.
    """
    flat = codes.reshape(-1, codes.shape[-1]) - codes.mean(axis=(0, 1))
    _, _, axes = np.linalg.svd(flat, full_matrices=False)
    parts = np.zeros((len(flat), 3))
    parts[:, : len(axes[:3])] = flat @ axes[:3].T
    low, span = parts.min(axis=0), np.ptp(parts, axis=0)
    levels = 40 + 190 * (parts - low) / np.where(span > 1e-6, span, 1)
    cells = Image.fromarray(levels.round().astype(np.uint8).reshape(*codes.shape[:2], 3))
    return cells.resize(size, Image.Resampling.NEAREST)


def _question(text: str, images: list[Image.Image]) -> dict[str, Any]:
    if not text:
        raise UserError("There is no text: ask something, or write what to draw.")
    check_characters(text)
    turn = user_turn(text)
    return turn | {"content": [*({"type": "image", "image": image} for image in images), *turn["content"]]}


def _shown(path: str) -> gr.Image:
    return gr.Image(path, show_label=False, container=False, buttons=["download", "fullscreen"], render=False)


def _answer(content: list[Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def _drawing(seed: str | None, guidance: float, temperature: float) -> Drawing:
    return Drawing.model_validate(
        {"seed": (seed or "").strip() or None, "guidance_scale": guidance, "temperature": temperature}
    )


def _sentence(error: Exception) -> gr.Error:
    return gr.Error(as_api_error(error).message, title="That did not work", duration=8, print_exception=False)

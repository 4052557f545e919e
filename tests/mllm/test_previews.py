"""Previews while images are generated: which rows they show, that the last is the image, and that closing ends them."""

import gc
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

from tests.mllm import tiny
from tests.tokenizer.conftest import tiny as tiny_tokenizer
from unimm.chat import ChatSession
from unimm.errors import UserError
from unimm.mllm import attach
from unimm.mllm.previews import DrawingStreamer, Preview, PreviewStream, images_so_far

GRAY = 128


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("settings", [{}, {"guidance_scale": 3.0}, {"parallel_tokens": 3, "guidance_scale": 3.0}])
@pytest.mark.parametrize("num_images", [1, 3])
def test_previews_show_the_rows_so_far_and_end_with_the_images(
    session: ChatSession, num_images: int, settings: dict
) -> None:
    expected = session.draw("two", num_images, seed=4, **settings)
    seen: list[tuple] = []
    images = session.draw("two", num_images, seed=4, on_image=lambda *given: seen.append(given), **settings)
    assert [image.tobytes() for image in images] == [image.tobytes() for image in expected]
    assert [(done, total) for _, done, total in seen] == [(4, 16), (8, 16), (12, 16), (16, 16)]
    assert [image.tobytes() for image in seen[-1][0]] == [image.tobytes() for image in expected]
    for shown, done, _ in seen:
        assert len(shown) == num_images
        for image in shown:
            assert (array(image)[done:] == GRAY).all() and (array(image)[:done] != GRAY).any(axis=(1, 2)).all()


def test_a_preview_is_what_the_decoder_makes_of_the_first_ids(parts: tuple) -> None:
    model, processor = parts
    inputs = processor(text=[processor.drawing_prompt(text) for text in ("two", "one")], padding=True)
    inputs = inputs.convert_to_tensors("pt")
    seen: list[tuple] = []
    streamer = DrawingStreamer(model, processor, on_image=lambda *given: seen.append(given), rows=3)
    token_ids = model.generate(**inputs, generation_mode="image", seed=1, streamer=streamer)
    assert [done for _, done, _ in seen] == [12, 16]
    ids = token_ids - model.visual_vocabulary.base
    filled = torch.cat([ids[:, :12], ids[:, 8:12]], 1)  # by hand: the last row is the one above it
    for expected, shown in zip(processor.postprocess(model.image_tokenizer.decode(filled)), seen[0][0], strict=True):
        np.testing.assert_array_equal(array(shown)[:12], array(expected)[:12])
        assert (array(shown)[12:] == GRAY).all()


def test_ids_that_are_no_patches_are_shown_whole() -> None:
    tokenizer = tiny_tokenizer("vfmtok", codebook_size=32, codebook_dim=8)
    model, processor = attach(tiny.language_model(), tokenizer, tiny.text_tokenizer())
    token_ids = model.visual_vocabulary.token_ids(torch.tensor([[4, 5, 6]]))
    (shown,) = images_so_far(model, processor, token_ids)
    (whole,) = processor.postprocess(model.decode_image_tokens(token_ids.repeat(1, 3)))
    assert shown.tobytes() == whole.tobytes() and not (array(shown)[-1] == GRAY).all()


def test_rows_that_are_not_whole_are_refused(parts: tuple) -> None:
    model, _ = parts
    for tokens in (0, 3, 20):
        with pytest.raises(ValueError, match=f"{tokens} image tokens are no whole rows of a grid of 4 x 4"):
            images_so_far(*parts, torch.full((1, tokens), model.visual_vocabulary.base))


@pytest.mark.parametrize("rows", [0, -1, 1.5, "2", True])
def test_preview_rows_without_a_meaning_are_one_sentence(session: ChatSession, rows: object) -> None:
    with pytest.raises(UserError, match="preview_rows is .*; give a whole number"):
        session.draw("two", on_image=print, preview_rows=rows)
    with pytest.raises(UserError, match="preview_rows is .*; give a whole number"):
        session.draw_stream("two", preview_rows=rows)
    assert session.messages == []


def test_the_stream_is_the_drawing_and_enters_the_history_with_its_last(session: ChatSession) -> None:
    session.ask("one")
    before = list(session.messages)
    expected = ChatSession(session.model, session.processor).draw("two", 2, seed=7, guidance_scale=2.0)
    stream = session.draw_stream("two", 2, preview_rows=2, seed=7, guidance_scale=2.0)
    first = next(stream)
    assert (first.done, first.total, first.final, session.messages) == (8, 16, False, before)
    last = next(stream)
    assert isinstance(last, Preview) and last.final and last.done == last.total == 16
    assert [image.tobytes() for image in last.images] == [image.tobytes() for image in expected]
    assert session.messages == [*before, tiny.user("two"), tiny.assistant(*last.images)]
    with pytest.raises(StopIteration):
        next(stream)


def test_wrong_settings_are_refused_before_a_preview(session: ChatSession) -> None:
    with pytest.raises(UserError, match="prompt is empty"):
        session.draw_stream("")
    with pytest.raises(UserError, match="guidance_scale is 0.3"):
        session.draw_stream("two", guidance_scale=0.3)
    with pytest.raises(UserError, match=r"\d{5} tokens long"):
        session.draw_stream("word " * 10_000)
    assert session.messages == [] and generating() == 0


def generating() -> int:
    return sum(thread.name.endswith("(_generate)") for thread in threading.enumerate())


def close(stream: PreviewStream) -> None:
    stream.close()


def leave(stream: PreviewStream) -> None:
    with stream:
        pass


@pytest.mark.parametrize("end", [close, leave])
def test_closing_ends_the_generation_and_keeps_the_history(
    session: ChatSession, monkeypatch: pytest.MonkeyPatch, end: Callable[[PreviewStream], None]
) -> None:
    steps = slow_steps(session, monkeypatch)
    stream = session.draw_stream("two", preview_rows=1)
    next(stream)
    end(stream)
    assert generating() == 0 and len(steps) < 17, "not the prompt and all 16 tokens"
    assert list(stream) == [] and session.messages == []
    assert session.draw("two", seed=1)[0].size == (16, 16)


def test_a_dropped_stream_ends_too(session: ChatSession, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = slow_steps(session, monkeypatch)
    stream = session.draw_stream("two")
    next(stream)
    del stream
    gc.collect()
    deadline = time.monotonic() + 10
    while generating() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert generating() == 0 and len(steps) < 17 and session.messages == []


def test_another_thread_can_close_a_stream_that_is_waited_for(
    session: ChatSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_steps(session, monkeypatch, seconds=0.05)
    stream = session.draw_stream("two", preview_rows=4)  # nothing to see before the image is complete
    closer = threading.Timer(0.1, stream.close)
    closer.start()
    assert list(stream) == []
    closer.join()
    assert generating() == 0 and session.messages == []


def test_a_stream_closed_after_its_generation_ended_leaves_the_history(session: ChatSession) -> None:
    stream = session.draw_stream("two", preview_rows=1)
    next(stream)
    stream._thread.join()
    stream.close()
    assert list(stream) == [] and session.messages == []


def test_what_fails_midway_is_raised_in_the_iteration(session: ChatSession, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = session.draw_stream("two", preview_rows=1)
    monkeypatch.setattr(session.processor, "postprocess", lambda pixels: 1 / 0)
    failing = session.draw_stream("two", preview_rows=2)
    with pytest.raises(ZeroDivisionError):
        list(failing)
    stream.close()
    assert list(failing) == [] and session.messages == []


def slow_steps(session: ChatSession, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.03) -> list[int]:
    """Make every token take `seconds`; return a list that grows with each."""
    steps: list[int] = []
    put = DrawingStreamer.put

    def slow(self: DrawingStreamer, value: torch.Tensor) -> None:
        time.sleep(seconds)
        steps.append(1)
        put(self, value)

    monkeypatch.setattr(DrawingStreamer, "put", slow)
    return steps

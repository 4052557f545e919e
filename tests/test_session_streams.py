"""Drawings, edits, answers and streams of one session, one after the other and at the same time."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.mllm import tiny
from tests.test_editing import scene
from unimm.chat import ChatSession
from unimm.errors import UserError
from unimm.mllm.previews import PreviewStream


def pixels(images: list[Any]) -> list[bytes]:
    return [image.tobytes() for image in images]


def test_an_edit_reports_its_images_and_the_last_are_the_result(session: ChatSession) -> None:
    mask = np.zeros((4, 4), dtype=bool)
    mask[2, 1:3] = True
    asked: dict[str, Any] = {"num_images": 2, "seed": 3, "guidance_scale": 2.0}
    for more in ({}, {"mask": mask}, {"strength": 0.5}, {"mask": mask, "parallel_tokens": 4}):
        expected = session.edit("two", scene(), **asked, **more)
        seen: list[tuple] = []
        tokens: list[int] = []
        images = session.edit(
            "two",
            scene(),
            **asked,
            **more,
            on_image=lambda *given, seen=seen: seen.append(given),
            on_token=lambda done, total, tokens=tokens: tokens.append(done),
            preview_rows=2,
        )
        assert pixels(images) == pixels(expected) == pixels(seen[-1][0])
        assert [done for _, done, _ in seen] == [8, 16] and tokens == list(range(1, 17))


@pytest.mark.parametrize("settings", [{"history": True}, {"variation_of": scene(), "strength": 0.25}, {}])
def test_a_streamed_drawing_is_the_drawing(parts: tuple, settings: dict[str, Any]) -> None:
    def begun() -> ChatSession:
        session = ChatSession(*parts)
        session.messages = [tiny.user(scene(), "what is there?"), tiny.assistant("a red circle")]
        return session

    plain, streamed = begun(), begun()
    images = plain.draw("two", 2, 6, guidance_scale=2.0, **settings)
    *_, last = streamed.draw_stream("two", 2, seed=6, guidance_scale=2.0, **settings)
    assert pixels(last.images) == pixels(images) and streamed.messages == plain.messages


def test_a_streamed_edit_is_the_edit(session: ChatSession) -> None:
    with pytest.raises(UserError, match="no image to edit"):
        session.edit_stream("make it blue")
    expected = ChatSession(session.model, session.processor).edit("two", scene(), strength=0.5, seed=1)
    first, *_, last = session.edit_stream("two", scene(), strength=0.5, seed=1, preview_rows=1)
    assert not first.final and first.done == 4
    assert last.final and pixels(last.images) == pixels(expected)
    assert session.messages == [tiny.user("two", scene()), tiny.assistant(*last.images)]
    with session.edit_stream("make it blue", preview_rows=1) as stream:  # of the last image
        next(stream)
    assert len(session.messages) == 2, "it was closed before its end"
    *_, last = session.edit_stream("make it blue")
    assert session.messages[2:] == [tiny.user("make it blue"), tiny.assistant(*last.images)]


def exhaust(stream: Iterator[Any]) -> None:
    for _ in stream:
        pass


STREAMS: dict[str, Callable[[ChatSession], Any]] = {
    "ask": lambda session: session.ask("what?", stream=True),
    "draw": lambda session: session.draw_stream("what?", seed=1, preview_rows=1),
    "draw from the history": lambda session: session.draw_stream("what?", seed=1, preview_rows=1, history=True),
    "edit": lambda session: session.edit_stream("what?", scene(), seed=1, preview_rows=1),
}


@pytest.mark.parametrize("name", STREAMS)
def test_what_happens_during_a_stream_stays(session: ChatSession, name: str) -> None:
    session.ask("one")
    stream = STREAMS[name](session)
    next(stream)
    session.draw("two", seed=2)
    between = list(session.messages)
    exhaust(stream)
    assert session.messages[:4] == between and len(session.messages) == 6
    assert {"type": "text", "text": "what?"} in session.messages[4]["content"]
    stream = STREAMS[name](session)
    next(stream)
    session.reset()
    exhaust(stream)
    assert [turn["role"] for turn in session.messages] == ["user", "assistant"], "a reset is not undone"


@pytest.mark.parametrize("name", ["ask", "draw from the history"])
def test_turns_that_a_stream_drops_are_dropped_once(session: ChatSession, name: str) -> None:
    """Also if another exchange ended meanwhile, and dropped the same ones."""
    session.messages = [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}]
    turns = [turn for number in range(30) for turn in (tiny.user(f"{number}"), tiny.assistant(scene()))]
    session.messages += turns
    stream = STREAMS[name](session)
    next(stream)
    session.ask("two")
    between = list(session.messages)
    dropped = 61 + 2 - len(between)
    assert dropped > 2
    exhaust(stream)
    assert session.messages[0]["role"] == "system" and session.messages[:-2] == between


def test_an_answer_after_an_edit_sees_both_images(session: ChatSession, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []
    generate = session.model.generate
    monkeypatch.setattr(
        session.model, "generate", lambda **arguments: (given.append(arguments), generate(**arguments))[1]
    )
    (edited,) = session.edit("make it blue", scene(), seed=1)
    answer = session.respond("what is that?", seed=1, max_new_tokens=30)
    session.draw("two", history=True)
    images = [part for part in answer if isinstance(part, Image.Image)]
    counts = [len(each["pixel_values"]) for each in given]
    assert counts == [1, 2, 2 + len(images)]
    expected = session.processor.image_processor([scene(), edited], return_tensors="pt")["pixel_values"]
    assert np.array_equal(given[1]["pixel_values"].numpy(), expected.numpy())


def test_edits_go_on_when_the_history_is_full(session: ChatSession) -> None:
    """An edit reads its image alone; the next question forgets the oldest turns."""
    session.messages = [turn for _ in range(30) for turn in (tiny.user("two"), tiny.assistant(scene()))]
    before = list(session.messages)
    (edited,) = session.edit("make it blue", seed=1)
    assert session.messages == [*before, tiny.user("make it blue"), tiny.assistant(edited)]
    session.ask("what is that?")
    assert len(session.messages) < 30 and session.messages[-3] == tiny.assistant(edited)
    refusing = ChatSession(session.model, session.processor, overflow="refuse")
    refusing.messages = list(before)
    assert pixels(refusing.edit("make it blue", seed=1)) == pixels([edited])
    with pytest.raises(UserError, match="the model reads 256. Reset the conversation or give a shorter prompt"):
        refusing.draw("two", history=True)
    assert len(refusing.messages) == 62


def test_what_an_answer_with_images_cannot_do_is_one_sentence(session: ChatSession) -> None:
    null = session.model.config.null_prompt
    session.model.config.null_prompt = None
    session.generation |= {"do_sample": True, "sequence_bias": [[[session.model.config.boi_token_id], 50.0]]}
    try:
        with pytest.raises(UserError, match="Cannot draw: guidance needs a null prompt"):
            session.respond("two", guidance_scale=3.0, seed=1)
    finally:
        session.model.config.null_prompt = null
    for value in (2.5, "many", True):
        with pytest.raises(UserError, match="max_new_tokens is .*; give a whole number of tokens"):
            session.respond("two", max_new_tokens=value)
    with pytest.raises(UserError, match="max_new_tokens is 3 and an image takes 18"):
        session.respond("two", max_new_tokens=3)
    assert session.messages == []


def test_two_streams_of_a_session_do_not_meet(session: ChatSession) -> None:
    alone = [ChatSession(session.model, session.processor) for _ in range(2)]
    expected = [alone[0].draw("one", seed=1), alone[1].edit("two", scene(), seed=2)]
    streams: list[PreviewStream] = [session.draw_stream("one", seed=1), session.edit_stream("two", scene(), seed=2)]
    second, first = [list(stream)[-1] for stream in reversed(streams)]
    assert [pixels(first.images), pixels(second.images)] == [pixels(each) for each in expected]
    assert session.messages == alone[1].messages + alone[0].messages, "in the order in which they ended"

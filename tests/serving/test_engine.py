"""The engine: a batch returns what each request returns alone, the queue is bounded, hanging up frees a place."""

import functools
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from tests.mllm import tiny
from unimm.errors import UserError
from unimm.sampling import ImageSampling
from unimm.serving.engine import Busy, Closed, Engine
from unimm.serving.jobs import DrawRequest, Event, Failed, Finished, Piece, TextRequest, user_turn
from unimm.serving.settings import EngineSettings

GREEDY = ImageSampling(do_sample=False)


@pytest.fixture
def engine() -> Iterator[Engine]:
    """An engine on a random model of the smallest size; batches wait for a moment, so that tests can fill them."""
    engine = Engine(*tiny.unified(), EngineSettings(queue_size=64, batch_wait=0.2))
    yield engine
    engine.close()


def write(text: str, **fields: Any) -> TextRequest:
    """Return a request for an answer of at most 8 tokens."""
    defaults: dict[str, Any] = {"prompt_tokens": len(text) + 40, "max_new_tokens": 8, "sampling": GREEDY, "seed": 0}
    return TextRequest(messages=[user_turn(text)], **{**defaults, **fields})


def draw(prompt: str, **fields: Any) -> DrawRequest:
    """Return a request for an image."""
    defaults: dict[str, Any] = {"prompt_tokens": len(prompt) + 40, "image_tokens": 16, "seed": 0}
    return DrawRequest(prompt=prompt, **{**defaults, "sampling": ImageSampling(), **fields})


class Collected:
    """The events of a submitted request."""

    def __init__(self, engine: Engine, request: Any) -> None:
        self.events: list[Event] = []
        self.over = threading.Event()
        self.job = engine.submit(request, self.receive)

    def receive(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Finished | Failed):
            self.over.set()

    def results(self) -> list[Any]:
        assert self.over.wait(60)
        last = self.events[-1]
        assert isinstance(last, Finished), last
        return [each.tobytes() if hasattr(each, "tobytes") else each for each in last.results]


def watched(engine: Engine) -> list[tuple[str, int]]:
    """Return a list that fills with the kinds and sizes of batches."""
    batches: list[tuple[str, int]] = []
    engine.on_batch = lambda kind, size, seconds: batches.append((kind, size))
    return batches


def settled(engine: Engine, batches: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """Return the batches once the engine is idle: a batch is counted after its answers have been delivered."""
    until = time.monotonic() + 10
    while engine.waiting or engine._running:
        assert time.monotonic() < until
        time.sleep(0.005)
    return batches


def test_a_batch_of_answers_is_what_each_gets_alone(engine: Engine) -> None:
    requests = [
        write("one two three"),
        write("is there a blue ring?", n=3, sampling=ImageSampling(temperature=1.5, top_k=40), seed=3),
        write("x", max_new_tokens=20, stream=True),
        write("a photo of a red circle" * 3, sampling=ImageSampling(temperature=0.7, top_p=0.8), seed=4),
        replace(write("a"), messages=[tiny.user(tiny.image(), "what is it?")]),
    ]
    batches = watched(engine)
    alone = [Collected(engine, request).results() for request in requests]
    assert settled(engine, batches) == [("text", 1)] * 5
    batches.clear()
    together = [Collected(engine, request) for request in requests]
    assert [each.results() for each in together] == alone
    assert settled(engine, batches) == [("text", 5)]
    pieces = [event.text for event in together[2].events if isinstance(event, Piece)]
    assert "".join(pieces) == alone[2][0].text and len({each.text for each in alone[1]}) == 3


def test_a_batch_of_drawings_is_what_each_gets_alone(engine: Engine) -> None:
    requests = [
        draw("a red circle", n=2),
        draw("one two", sampling=ImageSampling(guidance_scale=3.0), seed=1),
        draw("three", sampling=ImageSampling(guidance_scale=1.5), n=3, seed=2, partial_images=2),
        replace(draw("is there?"), image=tiny.image("blue")),
    ]
    alone = [Collected(engine, request).results() for request in requests]
    settled(engine, [])
    batches = watched(engine)
    together = [Collected(engine, request) for request in requests]
    assert [each.results() for each in together] == alone
    assert settled(engine, batches) == [("image", 4)]
    assert len({image for each in alone for image in each}) == 7


def test_equal_requests_of_two_clients_get_equal_images(engine: Engine) -> None:
    """`generate` would count the second as a further image of the first: they run one after the other."""
    batches = watched(engine)
    first, second = (Collected(engine, draw("a red circle", seed=5)) for _ in range(2))
    assert first.results() == second.results() and settled(engine, batches) == [("image", 1)] * 2


def test_kinds_and_settings_have_batches_of_their_own_in_the_order_of_arrival(engine: Engine) -> None:
    batches = watched(engine)
    requests = [draw("a", seed=1), write("b"), draw("c", sampling=ImageSampling(temperature=0.5)), draw("d", seed=2)]
    collected = [Collected(engine, request) for request in requests]
    assert all(each.results() for each in collected)
    assert settled(engine, batches) == [("image", 2), ("text", 1), ("image", 1)]


def test_a_batch_keeps_within_its_budget() -> None:
    engine = Engine(*tiny.unified(), EngineSettings(batch_tokens=200, batch_wait=0.2))
    batches = watched(engine)
    collected = [Collected(engine, write("x", prompt_tokens=40, max_new_tokens=8)) for _ in range(9)]
    assert all(each.results() for each in collected)
    assert [size for _, size in settled(engine, batches)] == [4, 4, 1]  # 4 rows of 48 tokens
    with pytest.raises(UserError, match="needs 240 tokens at once and the server takes 200"):
        engine.submit(write("x", n=5, prompt_tokens=40), print)
    engine.close()


def test_the_cache_memory_is_a_budget_too() -> None:
    model, processor = tiny.unified()
    per_token = 2 * 2 * 1 * 16 * 4  # keys and values, layers, key heads, width, bytes
    engine = Engine(model, processor, EngineSettings(batch_memory=per_token * 100))
    assert engine.budget == 100
    engine.close()


def test_a_full_queue_refuses_and_hanging_up_frees_a_place() -> None:
    engine = Engine(*tiny.unified(), EngineSettings(queue_size=2, batch_wait=60))
    waiting = [Collected(engine, write("x")) for _ in range(2)]
    with pytest.raises(Busy) as busy:
        engine.submit(write("x"), print)
    assert 1 <= busy.value.retry_after <= 60
    engine.cancel(waiting[0].job)
    assert engine.waiting == 1
    third = Collected(engine, write("x"))
    engine.close()  # finishes what waits
    assert third.results() == waiting[1].results() and not waiting[0].events
    with pytest.raises(Closed):
        engine.submit(write("x"), print)


def test_images_of_waiting_requests_are_bounded() -> None:
    engine = Engine(*tiny.unified(), EngineSettings(queue_pixels=500, batch_wait=60))
    request = replace(write("x"), messages=[tiny.user(tiny.image(), "what?")])  # 240 pixels
    for _ in range(2):
        Collected(engine, request)
    with pytest.raises(Busy):
        engine.submit(request, print)
    engine.close()


@pytest.mark.parametrize("request_", [draw("a red circle", n=4), write("x", max_new_tokens=200)])
def test_a_batch_for_which_nobody_waits_ends(engine: Engine, request_: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    begun, go_on = threading.Event(), threading.Event()
    forward = engine.model.forward

    @functools.wraps(forward)
    def counted(*arguments: Any, **options: Any) -> Any:
        steps.append(1)
        begun.set()
        go_on.wait(10)
        return forward(*arguments, **options)

    monkeypatch.setattr(engine.model, "forward", counted)
    collected = Collected(engine, request_)
    assert begun.wait(10)
    engine.cancel(collected.job)
    go_on.set()
    settled(engine, [])
    assert len(steps) < 5 and not collected.events
    monkeypatch.undo()
    assert Collected(engine, write("x")).results()


def test_a_request_fails_only_by_itself(engine: Engine) -> None:
    bad = replace(write("x"), messages=[{"role": "nobody", "content": [{"type": "text", "text": "x"}]}])
    good, failing, other = Collected(engine, write("x")), Collected(engine, bad), Collected(engine, write("y"))
    assert good.results() and other.results() and failing.over.wait(10)
    assert isinstance(failing.events[-1], Failed)


def test_closing_with_a_timeout_tells_those_who_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(*tiny.unified())
    forward = engine.model.forward

    @functools.wraps(forward)
    def slow(*arguments: Any, **options: Any) -> Any:
        time.sleep(0.1)
        return forward(*arguments, **options)

    monkeypatch.setattr(engine.model, "forward", slow)
    first = Collected(engine, write("x", max_new_tokens=100))
    time.sleep(0.05)
    second = Collected(engine, draw("x"))
    engine.close(timeout=0.2)
    for each in (first, second):
        assert isinstance(each.events[-1], Failed) and isinstance(each.events[-1].error, Closed)


def test_run_and_events_are_for_callers_without_an_event_loop(engine: Engine) -> None:
    request = draw("three", partial_images=1)
    *previews, last = engine.events(request)
    assert len(previews) == 1 and isinstance(last, Finished)
    assert [image.tobytes() for image in last.results] == [image.tobytes() for image in engine.run(request)]
    with pytest.raises(UserError, match="guidance"):
        engine.run(draw("x", sampling=ImageSampling(guidance_scale=0.5)))

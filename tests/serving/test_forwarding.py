"""Requests that are passed on to processes which die before, in, or after their answers."""

from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from unimm.serving.errors import APIError, install_handlers
from unimm.serving.forwarding import ATTEMPTS, Ask, Forward, forwarding_app, messages_of
from unimm.serving.settings import ServingSettings


class Died(Exception):
    """The process is gone."""


def behind(*, dies_after: list[int | None], content_type: str = "text/event-stream") -> tuple[Ask, list[bytes]]:
    """A process that counts its runs; run k dies after `dies_after[k]` messages (None: not at all)."""
    bodies: list[bytes] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def pieces() -> AsyncIterator[str]:
            for number in range(3):
                yield f"{len(bodies)}.{number} "

        bodies.append((await receive())["body"])
        await StreamingResponse(pieces(), media_type=content_type)(scope, receive, send)

    async def ask(scope: dict[str, Any], body: bytes) -> AsyncIterator[Message]:
        limit = dies_after[len(bodies)]
        seen = 0
        async for message in messages_of(app, scope, body):
            if seen == limit:
                raise Died
            seen += 1
            yield message
        if seen == limit:
            raise Died

    return ask, bodies


def client(
    ask: Ask, settings: ServingSettings | None = None, refusal: Callable[[Exception], APIError | None] | None = None
) -> TestClient:
    forward = Forward(ask, Died) if refusal is None else Forward(ask, Died, refusal)
    return TestClient(forwarding_app(forward, settings or ServingSettings()), raise_server_exceptions=False)


@pytest.mark.parametrize("after", [0, 1])  # before the status, and between the status and the body
def test_a_request_whose_process_dies_runs_again(after: int) -> None:
    ask, bodies = behind(dies_after=[after, None])
    answer = client(ask).post("/v1/anything?x=1", content=b"question")
    assert (answer.status_code, answer.text) == (200, "2.0 2.1 2.2 ")
    assert bodies == [b"question", b"question"]


def test_what_has_begun_to_arrive_is_broken_off_with_an_event() -> None:
    ask, bodies = behind(dies_after=[2, None])
    answer = client(ask).post("/", content=b"q")
    assert answer.text.startswith("1.0 event: error\ndata: ") and "has died: try again" in answer.text
    assert len(bodies) == 1


def test_an_answer_that_is_no_stream_is_cut_off() -> None:
    ask, _ = behind(dies_after=[2], content_type="text/plain")
    with pytest.raises(Died):
        TestClient(forwarding_app(Forward(ask, Died), ServingSettings())).get("/")


def test_death_after_the_answer_does_not_matter() -> None:
    ask, bodies = behind(dies_after=[5])  # the status, three pieces, the end
    answer = client(ask).get("/")
    assert (answer.text, len(bodies)) == ("1.0 1.1 1.2 ", 1)


def test_it_gives_up() -> None:
    ask, bodies = behind(dies_after=[1] * 10)
    answer = client(ask).get("/")
    assert (answer.status_code, answer.headers["Retry-After"], len(bodies)) == (503, "5", ATTEMPTS)
    assert answer.json()["error"]["message"] == "3 processes that ran this request have died: try again."


def test_refusals_and_other_errors_are_answered_and_not_repeated() -> None:
    calls = []

    async def ask(scope: dict[str, Any], body: bytes) -> AsyncIterator[Message]:
        calls.append(scope["path"])
        raise ValueError("secret")
        yield {}

    answer = client(ask, refusal=lambda error: APIError(429, "Busy.")).get("/a")
    assert (answer.status_code, answer.json()["error"]["message"]) == (429, "Busy.")
    answer = client(ask).get("/b")
    assert answer.status_code == 500 and "secret" not in answer.text
    assert calls == ["/a", "/b"]


def test_the_door_stands_before_the_processes() -> None:
    ask, bodies = behind(dies_after=[None])
    guarded = client(ask, ServingSettings(api_keys=("k",), max_body=8))
    assert guarded.get("/").status_code == 401
    key = {"Authorization": "Bearer k"}
    assert guarded.post("/", content=b"123456789", headers=key).status_code == 413
    assert guarded.post("/", content=iter([b"12345", b"6789"]), headers=key).status_code == 413
    assert bodies == []
    assert guarded.post("/", content=b"12345678", headers=key).status_code == 200


def test_errors_of_the_app_are_its_answers() -> None:
    app = FastAPI()
    install_handlers(app)

    @app.get("/user")
    async def user() -> None:
        raise APIError(404, "Nothing.")

    @app.get("/ours")
    async def ours() -> None:
        raise ValueError("secret")

    async def ask(scope: dict[str, Any], body: bytes) -> AsyncIterator[Message]:
        async for message in messages_of(app, scope, body):
            yield message

    assert client(ask).get("/user").json()["error"]["message"] == "Nothing."
    answer = client(ask).get("/ours")
    assert answer.status_code == 500 and "its log says why" in answer.text


def test_closing_the_messages_ends_the_run() -> None:
    ended = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await anyio.sleep_forever()
        finally:
            ended.append(True)

    async def check() -> None:
        messages = messages_of(app, {"type": "http"}, b"")
        assert (await anext(messages))["status"] == 200  # type: ignore[call-overload]
        await messages.aclose()  # type: ignore[attr-defined]
        await anyio.sleep(0)
        assert ended == [True]

    anyio.run(check)


def test_an_app_that_fails_within_its_answer_raises() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ValueError("broken")

    async def check() -> None:
        with pytest.raises(ValueError, match="broken"):
            async for _ in messages_of(app, {"type": "http"}, b""):
                pass

    anyio.run(check)


def test_the_scope_is_plain() -> None:
    scopes = []

    async def ask(scope: dict[str, Any], body: bytes) -> AsyncIterator[Message]:
        scopes.append(scope)
        async for message in messages_of(PlainTextResponse("ok"), scope, body):
            yield message

    assert client(ask).get("/p%20q?x=1", headers={"X": "y"}).text == "ok"
    plain = scopes[0]
    assert (plain["path"], plain["raw_path"], plain["query_string"]) == ("/p q", b"/p%20q", b"x=1")
    assert (b"x", b"y") in plain["headers"]
    assert {"app", "router", "state", "extensions"} & set(plain) == set()

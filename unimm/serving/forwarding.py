"""Pass requests on to an app in another process, and once more if that process dies before it has answered.

Every endpoint may be run twice: nothing is stored, and with a seed the second answer is the first. What has reached
the client is never sent again, so a stream is repeated before its first event only.
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.sse import format_sse_event
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from unimm.serving.errors import APIError, install_handlers
from unimm.serving.security import Guard
from unimm.serving.settings import ServingSettings

logger = logging.getLogger(__name__)

Ask = Callable[[dict[str, Any], bytes], AsyncIterator[Message]]
"""Sends a request's plain scope and its body; yields the ASGI messages of the answer."""
ATTEMPTS = 3  # the second may meet a process that has died, too, before anyone knows
_PLAIN = ("type", "http_version", "method", "scheme", "path", "raw_path", "root_path", "query_string", "headers")


async def messages_of(app: ASGIApp, scope: Mapping[str, Any], body: bytes) -> AsyncIterator[Message]:
    """Run an app on a whole request and yield the messages of its answer; closing the iterator ends the run.

    Raises:
        Exception: what the app failed with, if its answer is not complete.
    """
    messages: asyncio.Queue[Message | None] = asyncio.Queue()
    requests = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if requests:
            return requests.pop()
        return await asyncio.Future()  # a client that hangs up ends the whole run

    run = asyncio.ensure_future(app(dict(scope), receive, messages.put))
    run.add_done_callback(lambda _: messages.put_nowait(None))
    ended = False
    try:
        while (message := await messages.get()) is not None:
            ended = _is_last(message)
            yield message
        if run.exception() is not None and not ended:  # starlette raises what it has answered with 500, too
            await run
    finally:
        run.cancel()


class Forward:
    """ASGI app that has its requests answered by `ask`.

    Args:
        ask: sends a request; each call may reach another process.
        died: the errors of `ask` that mean that the process is gone.
        refusal: the answer to another error of `ask`; None leaves it an error.
    """

    def __init__(
        self,
        ask: Ask,
        died: type[Exception],
        refusal: Callable[[Exception], APIError | None] = lambda error: None,
    ) -> None:
        self.ask, self.died, self.refusal = ask, died, refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request. Raise APIError (503) if each process that ran it has died."""
        body = await Request(scope, receive).body()
        plain = {name: scope[name] for name in _PLAIN if name in scope}
        plain["headers"] = [(bytes(name), bytes(value)) for name, value in scope["headers"]]
        for attempt in range(1, ATTEMPTS + 1):
            relay = _Relay(send)
            try:
                async for message in self.ask(plain, body):
                    await relay.pass_on(message)
                return
            except self.died as error:
                logger.warning("attempt %d of %d of a request failed: its process died", attempt, ATTEMPTS)
                if relay.ended:
                    return
                if relay.begun:
                    await relay.break_off(error)
                    return
            except Exception as error:
                if relay.begun or (refusal := self.refusal(error)) is None:
                    raise
                raise refusal from None
        raise APIError(
            503, f"{ATTEMPTS} processes that ran this request have died: try again.", headers={"Retry-After": "5"}
        )


class _Relay:
    """Sends an answer on, its status together with the first piece of its body."""

    def __init__(self, send: Send) -> None:
        self.send = send
        self.start: Message | None = None
        self.begun = self.ended = False

    async def pass_on(self, message: Message) -> None:
        """Send a message, or keep it if it is the status."""
        if message["type"] == "http.response.start":
            self.start = message
            return
        if not self.begun:
            assert self.start is not None
            self.begun = True
            await self.send(self.start)
        self.ended = _is_last(message)
        await self.send(message)

    async def break_off(self, error: Exception) -> None:
        """End a begun stream with an event that says so; raise the error if the answer is no stream."""
        assert self.start is not None
        if not Headers(raw=self.start["headers"]).get("content-type", "").startswith("text/event-stream"):
            raise error
        lost = APIError(503, "The process that ran this request has died: try again.")
        event = format_sse_event(event="error", data_str=json.dumps(lost.body()))
        await self.send({"type": "http.response.body", "body": event, "more_body": False})


def forwarding_app(forward: Forward, settings: ServingSettings) -> FastAPI:
    """Return the app that stands before the processes: it checks who asks and how much, then forwards."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    install_handlers(app)
    app.mount("/", forward)
    app.add_middleware(Guard, settings=settings, on_answer=lambda route, status: None)
    return app


def _is_last(message: Message) -> bool:
    return message["type"] == "http.response.body" and not message.get("more_body", False)

"""The engine's events on the event loop: an iterator that frees the request's place once nobody reads it."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from fastapi import Request
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from unimm.serving import jobs
from unimm.serving.engine import Engine
from unimm.serving.errors import APIError, as_api_error

PING_SECONDS = 15.0
"""A stream without news sends a comment this often, so that proxies keep it open."""
HUNG_UP = 499  # nginx's status for a client that has closed its connection


class Answers:
    """The events of a request that has been submitted to the engine."""

    def __init__(self, engine: Engine, request: jobs.Request) -> None:
        loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[jobs.Event] = asyncio.Queue()
        self._engine = engine

        def deliver(event: jobs.Event) -> None:
            loop.call_soon_threadsafe(self._events.put_nowait, event)

        self._job = engine.submit(request, deliver)

    def cancel(self) -> None:
        """Free the request's place; does nothing once it is over."""
        self._engine.cancel(self._job)

    async def next(self) -> jobs.Event:
        """Return the next event; raise what the request failed with."""
        event = await self._events.get()
        if isinstance(event, jobs.Failed):
            raise event.error
        return event

    async def events(self) -> AsyncGenerator[jobs.Event, None]:
        """Yield the events, `Finished` last; closing the iterator cancels the request."""
        try:
            while True:
                event = await self.next()
                yield event
                if isinstance(event, jobs.Finished):
                    return
        finally:
            self.cancel()

    async def results(self, request: Request) -> list[Any]:
        """Return the results; a client that hangs up cancels the request.

        Raises:
            APIError: if the client has hung up.
        """
        gone = asyncio.create_task(_disconnected(request))
        try:
            while True:
                event = asyncio.create_task(self.next())
                await asyncio.wait((event, gone), return_when=asyncio.FIRST_COMPLETED)
                if not event.done():
                    event.cancel()
                    raise APIError(HUNG_UP, "The client has closed the connection.")
                if isinstance(done := event.result(), jobs.Finished):
                    return done.results
        finally:
            gone.cancel()
            self.cancel()


async def _disconnected(request: Request) -> None:
    """Return once the client has closed its connection; its body has been read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events made of a request's events; hanging up, at any time, cancels the request.

    Args:
        answers: the request.
        messages: yields the data of the events, JSON objects or text; `name` is their `type`, if they have one.
    """

    def __init__(self, answers: Answers, messages: AsyncIterator[Any]) -> None:
        self._answers = answers
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(_encoded(messages), media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answers.cancel()


async def _encoded(messages: AsyncIterator[Any]) -> AsyncIterator[bytes]:
    """Encode messages as server-sent events, with comments while there is none; an error is the last message."""
    iterator = aiter(messages)
    pending: asyncio.Task[Any] | None = None
    try:
        while True:
            pending = pending or asyncio.ensure_future(anext(iterator))
            done, _ = await asyncio.wait((pending,), timeout=PING_SECONDS)
            if not done:
                yield KEEPALIVE_COMMENT
                continue
            try:
                message = pending.result()
            except StopAsyncIteration:
                return
            except Exception as error:
                yield format_sse_event(event="error", data_str=json.dumps(as_api_error(error).body()))
                return
            finally:
                pending = None
            if isinstance(message, str):
                yield format_sse_event(data_str=message)
            else:
                yield format_sse_event(event=message.get("type"), data_str=json.dumps(message))
    finally:
        if pending is not None:
            pending.cancel()

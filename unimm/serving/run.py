"""Run the server: load the model, build the app, and serve it with uvicorn until it is told to stop."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from unimm.serving.app import create_app
from unimm.serving.engine import Engine
from unimm.serving.settings import EngineSettings, ServingSettings


def run_server(
    load: Callable[[], tuple[Any, Any]],
    settings: ServingSettings,
    engine_settings: EngineSettings,
    *,
    host: str,
    port: int,
    shutdown_seconds: int,
    extend: Callable[[FastAPI], None] | None = None,
) -> None:
    """Serve a model until SIGINT or SIGTERM; then finish what runs, for `shutdown_seconds` at most.

    Args:
        load: returns the model and its processor.
        extend: adds to the app, such as the web page.
    """
    app = create_app(Engine(*load(), engine_settings), settings)
    if extend is not None:
        extend(app)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level="info",
        server_header=False,
        timeout_graceful_shutdown=shutdown_seconds,
    )
    _Server(config, getattr(app.state, "end_streams", None)).run()


class _Server(uvicorn.Server):
    """A server that first ends the streams of open pages, which would last as long as their visitors stay."""

    def __init__(self, config: uvicorn.Config, end_streams: Callable[[], None] | None) -> None:
        super().__init__(config)
        self.end_streams = end_streams

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop at a signal."""
        if self.end_streams is not None:
            self.end_streams()
        super().handle_exit(sig, frame)


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """Serve an app from a thread, on a free port of this machine; yield its address, and stop at the end."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise RuntimeError("the server has not started; its log says why")
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()

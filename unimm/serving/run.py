"""Run the server: load the model, build the app, and serve it with uvicorn until it is told to stop."""

from collections.abc import Callable
from typing import Any

import uvicorn

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
) -> None:
    """Serve a model until SIGINT or SIGTERM; then finish what runs, for `shutdown_seconds` at most.

    Args:
        load: returns the model and its processor.
    """
    engine = Engine(*load(), engine_settings)
    config = uvicorn.Config(
        create_app(engine, settings),
        host=host,
        port=port,
        log_level="info",
        server_header=False,
        timeout_graceful_shutdown=shutdown_seconds,
    )
    uvicorn.Server(config).run()

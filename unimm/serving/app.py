"""`create_app`: the routes, the guard before them, and what happens when the server stops."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from anyio import to_thread
from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from unimm import __version__
from unimm.serving.chat_routes import chat_router
from unimm.serving.engine import Engine
from unimm.serving.errors import install_handlers
from unimm.serving.image_routes import image_router
from unimm.serving.responses_routes import responses_router
from unimm.serving.security import Guard
from unimm.serving.service import Service
from unimm.serving.service_routes import service_router
from unimm.serving.settings import ServingSettings

_ERROR = {"description": "An error in OpenAI's shape"}
_KNOWN_STATUSES = (400, 401, 403, 404, 413, 429, 500, 503)


def create_app(engine: Engine, settings: ServingSettings | None = None, *, close_engine: bool = True) -> FastAPI:
    """Build the app over an engine.

    Args:
        engine: runs the model.
        settings: names, keys and limits.
        close_engine: whether the engine is closed when the app stops; what runs is finished first.
    """
    settings = settings or ServingSettings()
    service = Service(engine, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        if close_engine:
            await to_thread.run_sync(engine.close)

    app = FastAPI(
        title="unimm",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # their pages load scripts from other hosts
        redoc_url=None,
        responses=dict.fromkeys(_KNOWN_STATUSES, _ERROR),
    )
    app.state.service = service
    install_handlers(app)
    for router in (chat_router(service), image_router(service), responses_router(service), service_router(service)):
        app.include_router(router)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(settings.cors_origins), allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(Guard, settings=settings, on_answer=service.metrics.count_answer)
    return app

"""Routes about the server itself: its models, its health, its metrics."""

from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from unimm.errors import printable
from unimm.serving.errors import APIError
from unimm.serving.metrics import CONTENT_TYPE
from unimm.serving.service import Service


def service_router(service: Service) -> APIRouter:
    """Return the routes about the server itself: models, health, metrics."""
    router = APIRouter()

    def model(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": service.started, "owned_by": "unimm"}

    @router.get("/v1/models", summary="List the names of the model")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model(name) for name in service.model_names]}

    @router.get("/v1/models/{name:path}", summary="One name of the model")
    async def one_model(name: str) -> dict[str, Any]:
        if name not in service.model_names and service.settings.aliases:
            raise APIError(404, f"There is no model {printable(name)!r}.", code="model_not_found")
        return model(name)

    @router.get("/health", summary="Whether the server takes requests")
    async def health() -> dict[str, str]:
        if not service.engine.alive:
            raise APIError(503, "The engine has stopped.")
        return {"status": "ok"}

    @router.get("/metrics", summary="Counters for Prometheus")
    async def metrics() -> Response:
        return Response(service.metrics.page(), media_type=CONTENT_TYPE)

    return router

"""Errors in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}` and the status that belongs to it."""

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from unimm.errors import UserError, one_line, printable
from unimm.serving.engine import Busy, Closed

logger = logging.getLogger(__name__)

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_LONGEST = 500  # characters of a message


class APIError(Exception):
    """An answer other than 200: one sentence, with its status and, if there is one, its code and parameter."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.headers = status, message, code, param, headers

    def body(self) -> dict[str, Any]:
        """Return the JSON object of the answer."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        message = printable(self.message)[:_LONGEST]
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """Return the answer."""
        return JSONResponse(self.body(), self.status, self.headers)


def as_api_error(error: Exception) -> APIError:
    """Return the answer to any exception; what is no mistake of the client is logged, and not told."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, Busy):
        headers = {"Retry-After": str(error.retry_after)}
        return APIError(429, str(error), code="rate_limit_exceeded", headers=headers)
    if isinstance(error, Closed):
        return APIError(503, str(error), headers={"Retry-After": "5"})
    if isinstance(error, UserError):
        return APIError(400, one_line(error))
    if isinstance(error, RequestValidationError | ValidationError):
        return _invalid(error)
    if isinstance(error, HTTPException):
        return APIError(error.status_code, one_line(Exception(error.detail)), headers=dict(error.headers or {}))
    logger.error("a request failed", exc_info=error)
    return APIError(500, "The server failed at this request; its log says why.")


def _invalid(error: RequestValidationError | ValidationError) -> APIError:
    """Name the first field that is wrong."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if part != "body")
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        return APIError(400, f"The body is not valid JSON: {first.get('ctx', {}).get('error', message)}.")
    if first["type"] == "missing":
        message = "this field is missing"
    return APIError(400, f"{place}: {message}." if place else f"{message}.", param=printable(place) or None)


def install_handlers(app: FastAPI) -> None:
    """Answer all exceptions of the app in OpenAI's shape."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response()

    for kind in (APIError, UserError, Busy, Closed, RequestValidationError, ValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)

"""The door: who may ask, from where, and how many at once. It stands before bodies are read."""

import base64
import binascii
import hmac
import urllib.parse
from collections.abc import Callable, Sequence

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from unimm.serving.errors import APIError
from unimm.serving.settings import ServingSettings

PAGE = "/web"
"""Path of the web page, whose visitors may give the API key as the password that browsers ask for."""
_OPEN_PATHS = ("/health",)
_KEPT = "/images/"  # its names cannot be guessed, and browsers send no key


class Guard:
    """ASGI middleware that checks a request's Host, Origin and API key, and bounds its body and the number of
    open requests.

    Args:
        on_answer: called with the route and the status of each answer.
    """

    def __init__(self, app: ASGIApp, settings: ServingSettings, on_answer: Callable[[str, int], None]) -> None:
        self.app, self.settings, self.on_answer, self.open = app, settings, on_answer, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with an error, or pass the request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.on_answer(getattr(scope.get("route"), "path", "other"), message["status"])
            await send(message)

        received = 0

        async def bounded() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.settings.max_body:
                raise HTTPException(413, self._too_large())
            return message

        error = self._refusal(scope)
        if error is not None:
            await error.response()(scope, receive, counted)
            return
        self.open += 1
        try:
            await self.app(scope, bounded, counted)
        finally:
            self.open -= 1

    def _refusal(self, scope: Scope) -> APIError | None:
        headers, settings = Headers(scope=scope), self.settings
        host = headers.get("host", "")
        if settings.allowed_hosts and _without_port(host) not in settings.allowed_hosts:
            return APIError(403, "This server does not answer under that host name.")
        origin = headers.get("origin")
        if origin is not None and not self._same_origin(origin, host):
            return APIError(403, "Pages of other origins may not call this server: allow the origin to change that.")
        if scope["path"] in _OPEN_PATHS or scope["path"].startswith(_KEPT):
            return None
        page = scope["path"] == "/" or scope["path"].startswith(PAGE)
        if settings.api_keys and not _is_key(headers.get("authorization", ""), settings.api_keys, basic=page):
            if scope["method"] == "OPTIONS" and origin in settings.cors_origins:
                return None  # browsers ask without the key whether they may send it
            return APIError(
                401,
                "The API key is missing or wrong: send the header Authorization: Bearer KEY.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": 'Basic realm="unimm", charset="UTF-8"' if page else "Bearer"},
            )
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > settings.max_body:
            return APIError(413, self._too_large())
        if self.open >= settings.max_requests:
            return APIError(
                429,
                f"{self.open} requests are open and the server takes {settings.max_requests}: try again in 1 s.",
                code="rate_limit_exceeded",
                headers={"Retry-After": "1"},
            )
        return None

    def _too_large(self) -> str:
        return f"The body is too large: the server takes {self.settings.max_body} bytes."

    def _same_origin(self, origin: str, host: str) -> bool:
        try:
            return origin in self.settings.cors_origins or urllib.parse.urlsplit(origin).netloc == host
        except ValueError:
            return False


def _without_port(host: str) -> str:
    try:
        return urllib.parse.urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _is_key(authorization: str, keys: Sequence[str], *, basic: bool) -> bool:
    """Compare the given key with all keys, in a time that does not depend on how much of it is right.

    Args:
        basic: whether the key may come as the password of a user, of any name, too.
    """
    scheme, _, given = authorization.partition(" ")
    digest = given.strip().encode("utf-8", "surrogateescape")
    if basic and scheme.lower() == "basic":
        try:
            digest = base64.b64decode(digest, validate=True).partition(b":")[2]
        except binascii.Error:
            return False
    elif scheme.lower() != "bearer":
        return False
    matches = [hmac.compare_digest(digest, key.encode()) for key in keys]
    return any(matches)

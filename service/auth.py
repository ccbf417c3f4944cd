"""Who may ask: with keys configured, everything but the open paths needs one of them. Plain ASGI."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from hashlib import sha256

from pydantic import SecretStr
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import ApiError, error_response

OPEN_PATHS = frozenset(
    ("/health", "/ready", "/metrics", "/version", "/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json")
)
"""What monitoring needs, and pages that hold nothing of the service's own."""
HOW = "send one as `Authorization: Bearer KEY` or as `X-Api-Key: KEY`"


class Authentication:
    """Answers 401 before the body is read, unless a request shows one of `keys`, of which there is at least one."""

    def __init__(self, app: ASGIApp, keys: Sequence[SecretStr]) -> None:
        self._app = app
        self._digests = [_digest(key.get_secret_value().encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        shown = _shown_keys(scope)
        if any(self._knows(key) for key in shown):
            await self._app(scope, receive, send)
        else:
            what = "the API key of this request is not known here" if shown else "this service needs an API key"
            error = ApiError(401, f"{what}: {HOW}", code="invalid_api_key")
            error.headers = {"WWW-Authenticate": "Bearer"}
            await error_response(Request(scope), error)(scope, receive, send)

    def _knows(self, key: bytes) -> bool:
        """In a time that tells nothing: digests have one length, and all of them are compared."""
        digest = _digest(key)
        return sum(hmac.compare_digest(digest, known) for known in self._digests) > 0


def _digest(key: bytes) -> bytes:
    return sha256(key).digest()


def _shown_keys(scope: Scope) -> list[bytes]:
    """Empty ones left out."""
    shown = []
    for name, value in scope["headers"]:
        if name == b"x-api-key":
            shown.append(value.strip())
        elif name == b"authorization":
            scheme, _, key = value.strip().partition(b" ")
            if scheme.lower() == b"bearer":
                shown.append(key.strip())
    return [key for key in shown if key]

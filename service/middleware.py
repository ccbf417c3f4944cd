"""ASGI middleware: request ids and the limits on bodies.

Plain ASGI, since Starlette's BaseHTTPMiddleware hides a client's disconnect from the route.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import ApiError, error_response

STALLED_S = 60.0
"""How long a client may be silent in the middle of a body."""
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


@dataclass(slots=True)
class RequestId:
    """Gives every request an id, the client's own `X-Request-Id` where it sends a plain one, and answers with it."""

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        await self.app(scope, receive, send_with_id)


@dataclass(slots=True)
class BodyLimit:
    """Refuses a larger body with 413, on the length it announces or else once it has grown past the limit.

    One that stops in the middle is a 408.
    """

    app: ASGIApp
    limit: int
    larger: Mapping[str, int] = field(default_factory=dict)
    """Path -> its own limit."""
    stalled_s: float = STALLED_S

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit = self.larger.get(scope["path"], self.limit)
        received = 0
        is_complete = False

        async def receive_limited() -> Message:
            nonlocal received, is_complete
            try:
                async with asyncio.timeout(None if is_complete else self.stalled_s):
                    message = await receive()
            except TimeoutError:
                raise _stalled(self.stalled_s) from None
            received += len(message.get("body", b""))
            is_complete = not message.get("more_body", False)
            if received > limit:
                raise _too_large(limit)
            return message

        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and int(announced) > limit:
            await error_response(Request(scope), _too_large(limit))(scope, receive, send)
        else:
            await self.app(scope, receive_limited, send)


def _stalled(seconds: float) -> ApiError:
    return ApiError(408, f"nothing of the body came for {seconds:g} seconds: send it again", code="body_timeout")


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body is larger than the {limit} bytes that this route takes", code="body_too_large")

"""Answers to clients that may leave: work that ends when the client is gone, and server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.errors import as_api_error

ResultT = TypeVar("ResultT")

DONE = b"data: [DONE]\n\n"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # the second one is for nginx


class ClientGone(Exception):
    """The client closed the connection before its answer was complete."""


def event(data: object) -> bytes:
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, ResultT]) -> ResultT:
    """The result of `work`; when the client leaves first, `work` is cancelled and ClientGone raised.

    The body of the request must have been read: `receive` then has nothing but the disconnect left.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnect(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def event_stream(receive: Receive, events: AsyncGenerator[bytes]) -> Response:
    """Stream `events`, and close the generator when the client leaves.

    An error before the first event is raised, so that it becomes a plain HTTP answer. A later one becomes an error
    event, with [DONE] behind it.
    """

    async def begin() -> bytes:
        return await anext(events)

    first = await unless_gone(receive, begin())
    return EventStream(first, events)


class EventStream(Response):
    media_type = "text/event-stream"

    def __init__(self, first: bytes, events: AsyncGenerator[bytes]) -> None:
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self._first = first
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            await unless_gone(receive, self._send_all(send))
        except ClientGone:
            return
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_all(self, send: Send) -> None:
        async with aclosing(self._events):
            await send({"type": "http.response.body", "body": self._first, "more_body": True})
            try:
                async for item in self._events:
                    await send({"type": "http.response.body", "body": item, "more_body": True})
            except Exception as error:  # noqa: BLE001 - told to the client, and logged where it is our own
                tail = b"data: " + as_api_error(error).body() + b"\n\n" + DONE
                await send({"type": "http.response.body", "body": tail, "more_body": True})

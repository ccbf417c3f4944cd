"""What a request gets from the engine: outputs, or the reason why there are none. Torch-free.

EngineError
+-- EngineUnavailable   there is no engine: starting, dead or stopped. HTTP 503
+-- ModelUnavailable    its weights left the engine before the request was admitted, which then has no output yet:
|                       acquire a model and submit again
+-- RequestRejected     it can never be served as it stands. HTTP 400
+-- RequestCrashed      the engine failed in a step of this request. HTTP 500
+-- ModelLoadError      weights could not be loaded; the old ones still serve
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

from service.engine.messages import TokenOutput

KeyT = TypeVar("KeyT")
ItemT = TypeVar("ItemT")


class EngineError(Exception):
    """The engine could not do what it was asked."""


class EngineUnavailable(EngineError):
    """There is no engine to answer."""


class ModelUnavailable(EngineError):
    """The weights that the request names are not in the engine, or no longer."""


class RequestRejected(EngineError):
    """The request can never be served."""


class RequestCrashed(EngineError):
    """The engine failed while it worked on the request."""


class ModelLoadError(EngineError):
    """Weights could not be loaded."""


FAILURES: dict[str, type[EngineError]] = {
    "invalid": RequestRejected,
    "unavailable": ModelUnavailable,
    "internal": RequestCrashed,
}

Receive = Callable[[TokenOutput | EngineError], None]
"""Called with each output of a request, the last of which has a finish reason, or with the error that ends it."""


class Mailbox(Generic[KeyT, ItemT]):
    """Gathers what comes for several keys until its one reader looks: one wake-up, however much has come."""

    def __init__(self) -> None:
        self._items: list[tuple[KeyT, ItemT]] = []
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None

    def put(self, key: KeyT, item: ItemT) -> None:
        self._items.append((key, item))
        if (waiter := self._waiter) is not None:
            self._waiter = None
            if not waiter.done():  # its reader may have left
                waiter.set_result(None)

    async def take(self) -> list[tuple[KeyT, ItemT]]:
        """Everything that is there, in order; waits until that is something."""
        if not self._items:
            self._waiter = waiter = self._loop.create_future()
            await waiter
        items, self._items = self._items, []
        return items

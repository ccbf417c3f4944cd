"""What one request gets from the engine: outputs, or the reason why there are none. Torch-free.

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
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

from service.engine.messages import RequestTiming, TokenOutput


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


Outputs = asyncio.Queue[TokenOutput | EngineError]


class TokenStream(AsyncIterator[TokenOutput]):
    """The outputs of one request, the last with a finish reason. Dropping or closing it early aborts the request."""

    def __init__(self, outputs: Outputs, *, abort: Callable[[], object], forget: Callable[[], object]) -> None:
        """`abort` asks the engine to end the request, whose last output still comes; `forget` lets nothing come."""
        self._outputs = outputs
        self._abort = abort
        self._forget = forget
        self._is_over = False

    async def __anext__(self) -> TokenOutput:
        """Raises EngineError when the request failed."""
        if self._is_over:
            raise StopAsyncIteration
        try:
            item = await self._outputs.get()
        except asyncio.CancelledError:
            await self.aclose()
            raise
        if isinstance(item, EngineError):
            self._is_over = True
            raise item
        self._is_over = item.finish_reason is not None
        return item

    async def abort(self) -> RequestTiming | None:
        """End the request early, and wait for what the engine says of its time; None when it cannot say any more.

        That takes as long as the step under way. `aclose` does not wait.
        """
        self._abort()
        timing = None
        with suppress(EngineError):
            async for output in self:
                timing = output.timing
        return timing

    async def aclose(self) -> None:
        self._is_over = True
        self._abort()
        self._forget()

    def __del__(self) -> None:
        self._abort()
        self._forget()

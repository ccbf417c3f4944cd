"""The engine process as the rest of the API process sees it: requests in, tokens out, restarts after a death.

Torch-free. What requests raise is in `service.engine_stream`.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from typing import Any, Literal

from service.engine.messages import (
    AbortRequest,
    AddRequest,
    EngineConfig,
    EngineReady,
    Event,
    LoadModel,
    ModelLoaded,
    ModelLoadFailed,
    ModelUnloaded,
    RequestFailed,
    Shutdown,
    StepOutput,
    StepStats,
    UnloadModel,
)
from service.engine_process import EngineProcess, describe_exit
from service.engine_stream import (
    FAILURES,
    EngineError,
    EngineUnavailable,
    ModelLoadError,
    ModelUnavailable,
    Receive,
    RequestCrashed,
    RequestRejected,
)

__all__ = [
    "EngineClient",
    "EngineError",
    "EngineUnavailable",
    "ModelLoadError",
    "ModelUnavailable",
    "RequestCrashed",
    "RequestRejected",
]

logger = logging.getLogger(__name__)

State = Literal["starting", "ready", "dead", "asleep", "stopped"]

DEATH_GRACE_S = 1.0
"""How long a process that closed its socket may take to exit, before its requests are failed."""
STOP_GRACE_S = 5.0
FIRST_DELAY_S = 0.5
LONGEST_DELAY_S = 30.0
STEADY_S = 60.0
"""A process that lived so long is restarted with the shortest delay again."""


class EngineClient:
    """Owns the engine process. Not thread-safe: use it from one event loop."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        on_ready: Callable[[EngineReady], Awaitable[None]],
        on_stats: Callable[[StepStats], None],
        silence_limit_s: float | None = None,
    ) -> None:
        """`on_ready` is awaited after each start: a new process holds no weights. `on_stats` is called each step.

        A process that says nothing for `silence_limit_s` while requests run hangs: it is killed within twice that time.
        """
        self.config = config
        self.state: State = "stopped"
        self.ready: EngineReady | None = None
        self.known: EngineReady | None = None
        """What the last process said that was ready, also after its end."""
        self.stats: StepStats | None = None
        self.restarts = 0
        self.failure: str | None = None
        """Why the last process died, with the end of its log; None since the engine is ready."""
        self._on_ready = on_ready
        self._on_stats = on_stats
        self._silence_limit_s = silence_limit_s
        self._is_silent = False
        """Since `_watch` looked, or since requests came to an engine without any."""
        self._process: EngineProcess | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._is_stopping = False
        self._is_closed = False
        self._first_outcome: asyncio.Future[None] | None = None
        self._greeting: asyncio.Task[None] | None = None
        self._requests: dict[str, Receive] = {}
        self._loads: dict[str, asyncio.Future[ModelLoaded]] = {}
        self._unloads: dict[str, asyncio.Future[None]] = {}

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    @property
    def num_open(self) -> int:
        """Requests whose end has not come."""
        return len(self._requests)

    @property
    def has_given_up(self) -> bool:
        """Whether the engine refused its configuration and is not started again by itself."""
        return self.state == "dead" and self._supervisor is not None and self._supervisor.done()

    async def start(self) -> None:
        """Start the process and wait until it is ready and `on_ready` has returned, or until it has died.

        An engine that refuses its configuration stays dead, with the reason in `failure`; one that dies otherwise is
        started again. What `on_ready` raises the first time is raised here. Does nothing after `stop`.
        """
        if self._is_closed:
            return
        self._is_stopping = False
        self._first_outcome = asyncio.get_running_loop().create_future()
        self._supervisor = asyncio.create_task(self._supervise())
        await self._first_outcome

    async def settled(self) -> None:
        """Wait until a start that is under way has come to what `start` waits for."""
        if self._first_outcome is not None:
            await asyncio.wait([self._first_outcome])

    async def sleep(self) -> None:
        """End the process, and with it what it holds of the device, until `start`. Open requests end with `abort`."""
        await self._end("asleep")

    async def stop(self) -> None:
        """End the process for good; requests still open end with `abort`."""
        self._is_closed = True
        await self._end("stopped")

    async def _end(self, state: State) -> None:
        self.state = state
        self._is_stopping = True
        if self._supervisor is None:
            return
        if self._process is not None:
            self._process.send(Shutdown())
            await asyncio.wait([self._supervisor], timeout=STOP_GRACE_S)
        self._supervisor.cancel()
        await asyncio.wait([self._supervisor])

    def submit(self, request: AddRequest, receive: Receive) -> None:
        """Send a request before returning; `receive` is called with what comes of it. Raises EngineUnavailable."""
        process = self._running_process()
        request_id = request.request_id
        if request_id in self._requests:
            raise ValueError(f"the request id {request_id!r} is in use")
        process.send(request)
        if not self._requests:
            self._is_silent = False
        self._requests[request_id] = receive

    def abort(self, request_id: str) -> None:
        """End a request early. Its last output still comes, with the engine's timing: after the step under way."""
        if request_id in self._requests and self._process is not None:
            self._process.send(AbortRequest(request_id=request_id))

    def abandon(self, request_id: str) -> None:
        """End a request early, and let nothing more come of it. Does nothing for one that is over."""
        self.abort(request_id)
        self._requests.pop(request_id, None)

    async def load_model(self, command: LoadModel, /) -> ModelLoaded:
        """Load weights. Raises ModelLoadError with the reason, EngineUnavailable.

        What the command replaces stays until the caller's code up to its next await has run, so a caller that
        changes its pointer there sends no request to weights that are gone.
        """
        process = self._running_process()
        future = self._loads.get(command.model_id)
        if future is None:
            future = self._loads[command.model_id] = asyncio.get_running_loop().create_future()
            process.send(command)
        loaded = await asyncio.shield(future)
        if command.replaces not in (None, command.model_id):
            asyncio.get_running_loop().call_soon(process.send, UnloadModel(model_id=command.replaces))
        return loaded

    async def unload_model(self, model_id: str) -> None:
        """Drop weights; returns when their last request has finished. Raises EngineUnavailable."""
        process = self._running_process()
        future = self._unloads.get(model_id)
        if future is None:
            future = self._unloads[model_id] = asyncio.get_running_loop().create_future()
            process.send(UnloadModel(model_id=model_id))
        await asyncio.shield(future)

    def _running_process(self) -> EngineProcess:
        if self._process is None or self.ready is None:
            raise EngineUnavailable(f"the engine is {self.state}")
        return self._process

    # ---- the life of the process

    async def _supervise(self) -> None:
        clock = asyncio.get_running_loop().time
        delay = FIRST_DELAY_S
        while True:
            self.state = "starting"
            begin = clock()
            code = await self._live()
            if self._is_stopping or code == os.EX_CONFIG:
                return
            if clock() - begin > STEADY_S:
                delay = FIRST_DELAY_S
            logger.error("the engine is started again in %.1f s", delay)
            await asyncio.sleep(delay)
            delay = min(2 * delay, LONGEST_DELAY_S)
            self.restarts += 1

    async def _live(self) -> int | None:
        """One process from its start to its end. Returns its exit code, None when it could not be started."""
        try:
            self._process = process = await EngineProcess.start(self._take)
        except OSError as error:
            self._bury(f"the engine process could not be started: {error}", "")
            return None
        watch = asyncio.create_task(self._watch(process))
        try:
            process.send(self.config)
            await process.wait_closed()
        finally:
            watch.cancel()
            self.ready = None
            if not self._is_stopping:
                self.state = "dead"
            code = await process.end(DEATH_GRACE_S)
            self._process = None
            self._bury(f"the engine ended with {describe_exit(code)}", process.log_tail)
        if self._greeting is not None:
            await asyncio.wait([self._greeting])
        return code

    async def _watch(self, process: EngineProcess) -> None:
        """Kill a process that hangs. While weights are loaded a request may wait for long without hanging."""
        while self._silence_limit_s is not None:
            self._is_silent = True
            await asyncio.sleep(self._silence_limit_s)
            if self._is_silent and self._requests and not self._loads:
                logger.error(
                    "the engine said nothing for %.0f s while requests ran: it is killed", self._silence_limit_s
                )
                process.kill()
                return

    def _bury(self, reason: str, log_tail: str) -> None:
        """Fail everything that waited for the process."""
        if not self._is_stopping:
            self.state = "dead"
            self.failure = f"{reason}; its last lines:\n{log_tail}" if log_tail else reason
            logger.error("%s", self.failure)
        error = EngineUnavailable(reason)
        for receive in self._requests.values():
            receive(error)
        for load in self._loads.values():
            _fail(load, error)
        for unload in self._unloads.values():
            _fail(unload, error)
        self._requests.clear()
        self._loads.clear()
        self._unloads.clear()
        self._settle(None)

    def _settle(self, greeting: asyncio.Task[None] | None) -> None:
        """Let `start` return, or raise what `on_ready` raised."""
        assert self._first_outcome is not None
        error = None if greeting is None or greeting.cancelled() else greeting.exception()
        if not self._first_outcome.done():
            if error is None:
                self._first_outcome.set_result(None)
            else:
                self._first_outcome.set_exception(error)
        elif error is not None:
            logger.error("the engine is ready, and then failed to load what serves", exc_info=error)

    # ---- events

    def _take(self, event: Event) -> None:
        self._is_silent = False
        match event:
            case StepOutput():
                self._take_step(event)
            case RequestFailed():
                if (receive := self._requests.pop(event.request_id, None)) is not None:
                    receive(FAILURES[event.kind](event.message))
            case EngineReady():
                self._take_ready(event)
            case ModelLoaded():
                if (load := self._loads.pop(event.model_id, None)) is not None:
                    load.set_result(event)
            case ModelLoadFailed():
                if (load := self._loads.pop(event.model_id, None)) is not None:
                    _fail(load, ModelLoadError(event.message))
            case ModelUnloaded():
                if (unload := self._unloads.pop(event.model_id, None)) is not None:
                    unload.set_result(None)

    def _take_ready(self, event: EngineReady) -> None:
        if self._is_stopping:
            return
        self.state = "ready"
        self.ready = self.known = event
        self.failure = None
        self._greeting = asyncio.ensure_future(self._on_ready(event))
        self._greeting.add_done_callback(self._settle)

    def _take_step(self, event: StepOutput) -> None:
        self.stats = event.stats
        requests = self._requests
        for output in event.outputs:
            receive = requests.get(output.request_id)
            if receive is not None:  # it was abandoned otherwise
                if output.finish_reason is not None:
                    del requests[output.request_id]
                receive(output)
        self._on_stats(event.stats)


def _fail(future: asyncio.Future[Any], error: EngineError) -> None:
    """Whoever waits shields the future, so it is never done before; and by now nobody may wait."""
    future.set_exception(error)
    future.exception()

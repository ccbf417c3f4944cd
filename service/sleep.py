"""The engine's sleep: what leads into it, and out of it again. When to sleep is decided elsewhere. Torch-free.

Into it: new requests wait at the gate, loads come to their end, running requests too, or are cut off at the drain
limit; then the process ends, and with it everything that it held of the device. Out of it: the process starts, loads
what is served by then, and the gate opens. Both take turns, so whoever waited is answered before the next sleep.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from service.engine_client import EngineClient
from service.gate import unknown_end
from service.metrics import Metrics
from service.serving import Serving

logger = logging.getLogger(__name__)

POLL_S = 0.05
RETRY_S = 5.0
"""An engine that could not be started again is tried again after so long: the device may not be free yet."""


class EngineSleep:
    def __init__(self, engine: EngineClient, serving: Serving, metrics: Metrics, *, drain_s: float) -> None:
        self._engine = engine
        self._serving = serving
        self._gate = serving.gate
        self._metrics = metrics
        self._drain_s = drain_s
        self._turn = asyncio.Lock()
        self._waking: asyncio.Task[None] | None = None
        self._fell_asleep = 0.0
        self._is_closed = False

    def begin_asleep(self, reason: str, *, seconds_left: Callable[[], float | None] = unknown_end) -> None:
        """Instead of a first start of the engine."""
        self._gate.close(reason, seconds_left=seconds_left)
        self._note_asleep()
        self._engine.state = "asleep"

    async def fall_asleep(self, reason: str, *, seconds_left: Callable[[], float | None] = unknown_end) -> None:
        """Returns when the device is free. An engine that is starting starts first. When it is cancelled, the engine
        may be awake or asleep: `wake` must follow."""
        async with self._turn:
            if self._gate.phase == "asleep":
                return
            await self._engine.settled()
            self._gate.close(reason, seconds_left=seconds_left)
            logger.info("the engine falls asleep: %s", reason)
            async with self._serving.undisturbed():
                await self._drain()
                await self._end_engine()
            self._note_asleep()

    def wake(self) -> None:
        """Let it come back, beside what the caller does. Does nothing for one that is awake or waking up."""
        if not (self._gate.is_open or self._waking or self._is_closed):
            self._gate.wake()
            self._waking = asyncio.create_task(self._wake_up())

    async def close(self) -> None:
        """The service ends: nobody waits, nothing wakes."""
        self._is_closed = True
        self._gate.shut()
        if self._waking is not None:
            waking = self._waking
            waking.cancel()
            await asyncio.wait([waking])

    async def _end_engine(self) -> None:
        """To its end, also when nobody wants it any more: half of an engine could not be started again."""
        ending = asyncio.create_task(self._engine.sleep())
        try:
            await asyncio.shield(ending)
        except asyncio.CancelledError:
            await asyncio.wait([ending])
            raise

    async def _drain(self) -> None:
        last_moment = time.monotonic() + self._drain_s
        while self._engine.num_open and time.monotonic() < last_moment:
            await asyncio.sleep(POLL_S)

    async def _wake_up(self) -> None:
        async with self._turn:
            try:
                if self._engine.state == "asleep":
                    await self._start_engine()
                    self._metrics.woke(time.monotonic() - self._fell_asleep)
            except Exception:
                logger.exception("the engine is back, and then failed to load what serves")
            finally:
                self._waking = None
            self._gate.open()

    async def _start_engine(self) -> None:
        """One that refuses its configuration, and did not before, is asked again."""
        await self._engine.start()
        while self._engine.has_given_up and self._engine.known is not None:
            logger.error("the engine could not come back, it is tried again in %.0f s", RETRY_S)
            await asyncio.sleep(RETRY_S)
            await self._engine.start()

    def _note_asleep(self) -> None:
        self._gate.sleep()
        self._fell_asleep = time.monotonic()

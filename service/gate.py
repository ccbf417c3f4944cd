"""Where requests wait while the engine sleeps: a bounded number of them, and each for a bounded time. Torch-free."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil
from typing import Literal

from service.errors import ApiError, unavailable

Phase = Literal["awake", "falling asleep", "asleep", "waking"]

SHORTEST_RETRY_S, LONGEST_RETRY_S = 5, 300


def unknown_end() -> float | None:
    return None


@dataclass(slots=True, kw_only=True)
class Gate:
    """Open while the engine is awake. Whoever sends to the engine passes first."""

    patience_s: float
    """How long a request waits."""
    limit: int
    """How many wait at most."""
    phase: Phase = "awake"
    reason: str = ""
    """Why it is closed, for people."""
    since: float | None = None
    """Unix time at which it was closed."""
    num_waiting: int = 0
    _seconds_left: Callable[[], float | None] = unknown_end
    _opened: asyncio.Event = field(default_factory=asyncio.Event)
    _is_shut: bool = False

    @property
    def is_open(self) -> bool:
        return self.phase == "awake"

    def close(self, reason: str, *, seconds_left: Callable[[], float | None] = unknown_end) -> None:
        """From now on requests wait. `seconds_left` is asked for an estimate of how long."""
        self.phase, self.reason, self._seconds_left = "falling asleep", reason, seconds_left
        self.since = time.time()
        self._opened.clear()

    def sleep(self) -> None:
        """What it was closed for has begun."""
        self.phase = "asleep"

    def wake(self) -> None:
        """It is about to open."""
        self.phase, self.reason, self._seconds_left = "waking", "the engine is waking up", unknown_end

    def open(self) -> None:
        """Let all go on who wait; they do so before a `close` that is yet to be scheduled."""
        self.phase, self.reason, self.since = "awake", "", None
        self._opened.set()

    def shut(self) -> None:
        """The service ends: nobody waits any longer."""
        self._is_shut = True
        self._opened.set()

    async def passed(self) -> None:
        """Returns when it is open. Raises ApiError 503 for one who has waited long enough, or is one too many."""
        if self.is_open:
            return
        if self._is_shut or self.num_waiting >= self.limit:
            raise self.refusal()
        self.num_waiting += 1
        try:
            async with asyncio.timeout(self.patience_s):
                await self._opened.wait()
        except TimeoutError:
            raise self.refusal() from None
        finally:
            self.num_waiting -= 1
        if not self.is_open:
            raise self.refusal()

    def refusal(self) -> ApiError:
        """503, with the time after which another try is worth it."""
        return unavailable(f"{self.reason}; try again later", retry_after=self.retry_after)

    @property
    def retry_after(self) -> int:
        left = self._seconds_left()
        return SHORTEST_RETRY_S if left is None else min(LONGEST_RETRY_S, max(SHORTEST_RETRY_S, ceil(left)))

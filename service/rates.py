"""How fast something was done of late."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

WINDOW_S = 10.0


@dataclass(slots=True)
class Rates:
    """Work per second of work over the last seconds; 0 when there was none."""

    clock: Callable[[], float] = time.monotonic
    samples: deque[tuple[float, float, float]] = field(default_factory=deque)
    """(when, amount, seconds it took)"""

    def add(self, amount: float, seconds: float) -> None:
        if seconds > 0:
            now = self.clock()
            self.samples.append((now, amount, seconds))
            self._forget(now)

    def rate(self) -> float:
        self._forget(self.clock())
        seconds = sum(sample[2] for sample in self.samples)
        return sum(sample[1] for sample in self.samples) / seconds if seconds else 0.0

    def _forget(self, now: float) -> None:
        while self.samples and self.samples[0][0] < now - WINDOW_S:
            self.samples.popleft()

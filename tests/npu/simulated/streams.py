"""Streams and events. Every call has finished when it returns, so they only have an identity and a time.

Not simulated: order between streams, hence no hazard of reading too early shows here.
"""

from __future__ import annotations

import time

import torch

from tests.npu.simulated.statistics import Statistics


class Event:
    """`torch.npu.Event`."""

    def __init__(self, statistics: Statistics, enable_timing: bool = False) -> None:
        self._statistics = statistics
        self._recorded_at: float | None = None

    def record(self, stream: Stream | None = None) -> None:
        self._recorded_at = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        """Nothing is under way that a stream could wait for."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self._statistics.sync("Event.synchronize")

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds."""
        if self._recorded_at is None or end._recorded_at is None:
            raise RuntimeError("both events must be recorded before the time between them is read")
        return (end._recorded_at - self._recorded_at) * 1e3


class Stream:
    """`torch.npu.Stream`."""

    def __init__(self, statistics: Statistics, device: object = None, priority: int = 0) -> None:
        self._statistics = statistics
        self.priority = priority

    @property
    def device(self) -> torch.device:
        return torch.device("npu", 0)

    def synchronize(self) -> None:
        self._statistics.sync("Stream.synchronize")

    def wait_stream(self, stream: Stream) -> None:
        """Nothing is under way that could be waited for."""

    def wait_event(self, event: Event) -> None:
        """Nothing is under way that could be waited for."""

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event(self._statistics)
        event.record(self)
        return event

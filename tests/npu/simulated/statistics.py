"""What the host asked of the simulated device: calls, copies and waits, and a ban on waits for a test's critical part.

A host sync is anything that makes the host wait for the device before it can go on: reading a value (`item`,
`if tensor`), an operator whose output shape depends on values (`nonzero`, `masked_select`, a boolean mask as index), a
blocking copy in either direction (`tolist`, `cpu`, `torch.tensor(..., device=...)`), `synchronize`. On a card each of
them drains the queue.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


class HostSyncError(RuntimeError):
    """The program made the host wait for the device where the test, or a graph capture, does not allow it."""


@dataclass(frozen=True, slots=True)
class Ban:
    """No host sync, but for so many copies between host and device."""

    where: str
    copies_left: Counter[str]


@dataclass(slots=True)
class Statistics:
    """Counters since the last `reset`, and the ban in force."""

    calls: Counter[str] = field(default_factory=Counter)
    """Operator name -> number of calls that reached the device."""
    copies: Counter[str] = field(default_factory=Counter)
    """`upload`, `download` and `move` (from device to device)."""
    syncs: Counter[str] = field(default_factory=Counter)
    """What made the host wait -> how often."""
    replays: int = 0
    """Graph replays; the operators inside are not counted again."""
    _ban: Ban | None = None

    def reset(self) -> None:
        for counter in (self.calls, self.copies, self.syncs):
            counter.clear()
        self.replays = 0

    def sync(self, cause: str) -> None:
        """Count one wait of the host. Raises HostSyncError under a ban."""
        if self._ban is not None:
            raise HostSyncError(f"{cause} makes the host wait for the device, which is forbidden in {self._ban.where}")
        self.syncs[cause] += 1

    def host_copy(self, direction: str, *, blocking: bool) -> None:
        """Count an `upload` or `download`. Raises HostSyncError when a ban leaves no more of them."""
        if self._ban is not None:
            if self._ban.copies_left[direction] == 0:
                raise HostSyncError(f"one {direction} more than allowed in {self._ban.where}")
            self._ban.copies_left[direction] -= 1
        self.copies[direction] += 1
        if blocking:
            self.syncs[direction] += 1

    @contextmanager
    def forbid_host_sync(self, where: str, *, uploads: int = 0, downloads: int = 0) -> Iterator[None]:
        """Within the body every host sync raises HostSyncError, but for the copies allowed, blocking or not."""
        outer, self._ban = self._ban, Ban(where, Counter(upload=uploads, download=downloads))
        try:
            yield
        finally:
            self._ban = outer

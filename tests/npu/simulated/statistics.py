"""What the host asked of the simulated device: calls, copies and waits, and a ban on waits for a test's critical part.

A host sync is anything that makes the host wait for the device before it can go on: reading a value (`item`,
`tolist`, `if tensor`), an operator whose output shape depends on values (`nonzero`, `masked_select`, a boolean mask
as index), a blocking copy to the host, `synchronize`. On a card each of them drains the queue.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


class HostSyncError(RuntimeError):
    """The program made the host wait for the device where the test, or a graph capture, does not allow it."""


@dataclass(slots=True)
class Statistics:
    """Counters since the last `reset`, and the ban in force."""

    calls: Counter[str] = field(default_factory=Counter)
    """Operator name -> number of calls that reached the device."""
    syncs: Counter[str] = field(default_factory=Counter)
    """What made the host wait -> how often. Blocking downloads are among them, as `download`."""
    uploads: int = 0
    """Copies from host to device."""
    downloads: int = 0
    """Copies from device to host, blocking or not."""
    moves: int = 0
    """Copies from device to device."""
    replays: int = 0
    """Graph replays; the operators inside are not counted again."""
    _ban: str | None = None
    _downloads_left: int = 0

    def reset(self) -> None:
        self.calls.clear()
        self.syncs.clear()
        self.uploads = self.downloads = self.moves = self.replays = 0

    def sync(self, cause: str) -> None:
        """Count one wait of the host. Raises HostSyncError under a ban."""
        if self._ban is not None:
            raise HostSyncError(f"{cause} makes the host wait for the device, which is forbidden in {self._ban}")
        self.syncs[cause] += 1

    def download(self, *, blocking: bool) -> None:
        """Count one copy to the host. Raises HostSyncError when a ban leaves no more of them."""
        if self._ban is not None:
            if self._downloads_left == 0:
                raise HostSyncError(f"one copy to the host more than {self._ban} allows")
            self._downloads_left -= 1
        self.downloads += 1
        if blocking:
            self.syncs["download"] += 1

    @contextmanager
    def forbid_host_sync(self, where: str, *, downloads: int = 0) -> Iterator[None]:
        """Within the body every host sync raises HostSyncError, but for the first `downloads` copies to the host."""
        outer = self._ban, self._downloads_left
        self._ban, self._downloads_left = where, downloads
        try:
            yield
        finally:
            self._ban, self._downloads_left = outer

"""Device memory: storages over host memory, a capacity, an accounting as torch_npu's caching allocator shows it.

Simulated: the 512-byte granule, fresh memory full of garbage (bytes 0xFF: NaN as a float, -1 as an integer), the out
of memory error, current and peak figures, memory that stays reserved until `release_cache`, and the context that each
thread needs before it works on the device.
Not simulated: segments, fragmentation, streams that hold a block back.
"""

from __future__ import annotations

import gc
import threading
import weakref
from typing import cast

import torch

GRANULE = 512
POISON = 0xFF


class Memory:
    """The memory of the one device. Sizes are bytes."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.allocated = self.peak_allocated = 0
        self.reserved = self.peak_reserved = 0
        self.num_allocations = self.num_ooms = 0
        self.fraction = 1.0
        """What this process may take of the capacity."""
        self._context = threading.local()
        self.enter_thread()

    @property
    def free(self) -> int:
        return self.capacity - self.reserved

    def enter_thread(self) -> None:
        """Make the current thread one that may use the device."""
        self._context.is_set = True

    def allocate(self, num_bytes: int) -> torch.UntypedStorage:
        """A device storage. Raises torch.OutOfMemoryError beyond the capacity, RuntimeError without a context."""
        self._check_context()
        padded = -(-max(num_bytes, 1) // GRANULE) * GRANULE
        self._make_room(padded, num_bytes)
        backing = torch.full((padded,), POISON, dtype=torch.uint8)
        storage = storage_at(backing.data_ptr(), torch.device("npu", 0), num_bytes)
        storage._backing = backing  # type: ignore[attr-defined]  # the memory lives as long as the storage
        weakref.finalize(backing, self._release, padded).atexit = False
        self._grow(padded)
        return storage

    def reset_peaks(self) -> None:
        self.peak_allocated, self.peak_reserved = self.allocated, self.reserved

    def release_cache(self) -> None:
        self.reserved = self.allocated

    def _check_context(self) -> None:
        is_pythons = not isinstance(threading.current_thread(), threading._DummyThread)
        if is_pythons and not hasattr(self._context, "is_set"):  # torch cares for the threads of its own
            raise RuntimeError("107002: the context is empty; call torch.npu.set_device in this thread first")

    def _make_room(self, padded: int, num_bytes: int) -> None:
        allowed = int(self.fraction * self.capacity)
        if self.allocated + padded > allowed:
            gc.collect()  # tensors in reference cycles; a real allocator cannot, but a test must not depend on the moment
        if self.allocated + padded > allowed:
            self.num_ooms += 1
            raise torch.OutOfMemoryError(
                f"NPU out of memory. Tried to allocate {num_bytes / 2**20:.2f} MiB (simulated NPU 0; "
                f"{allowed / 2**20:.2f} MiB may be taken of {self.capacity / 2**20:.2f} MiB total capacity; {self.allocated / 2**20:.2f} MiB allocated)"
            )

    def _grow(self, padded: int) -> None:
        self.allocated += padded
        self.num_allocations += 1
        self.reserved = max(self.reserved, self.allocated)
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        self.peak_reserved = max(self.peak_reserved, self.reserved)

    def _release(self, padded: int) -> None:
        self.allocated -= padded


def storage_at(address: int, device: torch.device, num_bytes: int) -> torch.UntypedStorage:
    """A storage over memory that somebody else keeps alive."""
    construct = torch._C._construct_storage_from_data_pointer
    return cast("torch.UntypedStorage", construct(address, device, num_bytes))

"""A Python-side patch of storages: C++ finds no allocator for the device and would end the process."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tests.npu.simulated.memory import Memory, storage_at
from tests.npu.simulated.tensors import CPU


def patch(memory: Memory) -> None:
    """Let a device storage be cloned, as `copy.deepcopy` of a module does."""
    elsewhere: Callable[[torch.UntypedStorage], torch.UntypedStorage] = torch.UntypedStorage.clone

    def clone(storage: torch.UntypedStorage) -> torch.UntypedStorage:
        if storage.device.type != "npu":
            return elsewhere(storage)
        copy = memory.allocate(storage.nbytes())
        _bytes_of(copy).copy_(_bytes_of(storage))
        return copy

    setattr(torch.UntypedStorage, "clone", clone)  # noqa: B010 - mypy refuses the plain assignment


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    """The storage's memory as a CPU tensor."""
    return torch.empty(0, dtype=torch.uint8).set_(storage_at(storage.data_ptr(), CPU, storage.nbytes()))

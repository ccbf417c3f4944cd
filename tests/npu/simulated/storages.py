"""Python-side patches of storages: C++ finds no allocator for the device and would end the process."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tests.npu.simulated.memory import Memory, storage_at
from tests.npu.simulated.tensors import CPU

Copy = Callable[[torch.UntypedStorage], torch.UntypedStorage]


def patch(memory: Memory) -> None:
    """Let a device storage be cloned (`copy.deepcopy` of a module) and brought to the host."""

    def clone(storage: torch.UntypedStorage) -> torch.UntypedStorage:
        copy = memory.allocate(storage.nbytes())
        _bytes_of(copy).copy_(_bytes_of(storage))
        return copy

    def cpu(storage: torch.UntypedStorage) -> torch.UntypedStorage:
        return _bytes_of(storage).clone().untyped_storage()

    for name, on_device in (("clone", clone), ("cpu", cpu)):
        setattr(torch.UntypedStorage, name, _by_device(on_device, getattr(torch.UntypedStorage, name)))


def _by_device(on_device: Copy, elsewhere: Copy) -> Copy:
    return lambda storage: on_device(storage) if storage.device.type == "npu" else elsewhere(storage)


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    """The storage's memory as a CPU tensor."""
    return torch.empty(0, dtype=torch.uint8).set_(storage_at(storage.data_ptr(), CPU, storage.nbytes()))

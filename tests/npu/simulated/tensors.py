"""Device tensors: how they are made, resized, and seen from the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch

from tests.npu.simulated.memory import Memory, storage_at

CPU = torch.device("cpu")
CPU_KERNELS = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


def is_on_device(value: Any) -> TypeGuard[torch.Tensor]:
    return isinstance(value, torch.Tensor) and value.device.type == "npu"


def check_device(device: torch.device | None) -> None:
    """Raises RuntimeError for a card that this machine does not have."""
    if device is not None and device.type == "npu" and device.index not in (None, 0):
        raise RuntimeError(f"Invalid device ID {device.index}: the simulated machine has one NPU, number 0")


def contiguous_strides(size: Sequence[int]) -> list[int]:
    strides: list[int] = []
    step = 1
    for length in reversed(size):
        strides.append(step)
        step *= max(length, 1)
    return strides[::-1]


def new_tensor(memory: Memory, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised device tensor."""
    reach = sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    num_elements = 0 if 0 in size else 1 + reach
    tensor = torch._C._acc.create_empty_tensor(tuple(size), dtype)
    return point_at(tensor, memory.allocate(num_elements * dtype.itemsize), size, stride)


def point_at(
    tensor: torch.Tensor, storage: torch.UntypedStorage, size: Sequence[int], stride: Sequence[int]
) -> torch.Tensor:
    """Let `tensor` show `storage` from its start. The CPU kernel does: it only touches the tensor's metadata."""
    set_storage = torch.ops.aten.set_.source_Storage_storage_offset
    set_storage.redispatch(CPU_KERNELS, tensor, storage, 0, size, stride)
    return tensor


def resize(memory: Memory, tensor: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """`Tensor.resize_`: a new, contiguous shape; new memory where the old does not suffice."""
    storage = tensor.untyped_storage()
    num_bytes = tensor.dtype.itemsize
    for length in size:
        num_bytes *= length
    if num_bytes > storage.nbytes():
        storage = memory.allocate(num_bytes)
    return point_at(tensor, storage, size, contiguous_strides(size))


def host_view(tensor: torch.Tensor) -> torch.Tensor:
    """A CPU tensor over the memory of a device tensor: what is written there is written on the device."""
    storage = tensor.untyped_storage()
    host_storage = storage_at(storage.data_ptr(), CPU, storage.nbytes())
    view = torch.empty(0, dtype=tensor.dtype)
    return view.set_(host_storage, tensor.storage_offset(), tensor.size(), tensor.stride())


def to_device(memory: Memory, tensor: torch.Tensor) -> torch.Tensor:
    """A device tensor with the values and the strides of a CPU tensor."""
    result = new_tensor(memory, tensor.size(), tensor.stride(), tensor.dtype)
    if tensor.numel():
        host_view(result).copy_(tensor)
    return result

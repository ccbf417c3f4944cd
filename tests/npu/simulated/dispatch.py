"""Registers the device's kernels with torch's dispatcher: the fallback, factories, copies, scalar reads and views."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._ops import OpOverload

from tests.npu.simulated.graph import Recorder
from tests.npu.simulated.kernels import HostKernels
from tests.npu.simulated.memory import Memory
from tests.npu.simulated.statistics import Statistics
from tests.npu.simulated.tensors import (
    CPU_KERNELS,
    check_device,
    contiguous_strides,
    host_view,
    is_on_device,
    new_tensor,
    resize,
)

# Their CPU kernels touch sizes, strides and offsets only; called directly, they give views that really share memory.
METADATA_OPERATORS = (
    "as_strided",
    "view",
    "_reshape_alias",
    "unfold",
    "view_as_real",
    "view_as_complex",
    "set_.source_Storage",
    "set_.source_Storage_storage_offset",
    "set_.source_Tensor",
)
MATH_ATTENTION = 0  # scaled_dot_product_attention through primitive operators, as without a fused kernel


def find_operator(name: str) -> OpOverload:
    """`add.Tensor` -> the overload in torch.ops.aten."""
    packet, _, overload = name.partition(".")
    found: OpOverload = getattr(getattr(torch.ops.aten, packet), overload or "default")
    return found


class Factories:
    """Operators that make memory."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory

    def empty(
        self, size: Sequence[int], *, dtype: torch.dtype | None = None, device: torch.device | None = None, **_: Any
    ) -> torch.Tensor:
        return self.empty_strided(size, contiguous_strides(size), dtype=dtype, device=device)

    def empty_strided(
        self,
        size: Sequence[int],
        stride: Sequence[int],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        **_: Any,
    ) -> torch.Tensor:
        check_device(device)
        return new_tensor(self._memory, size, stride, dtype or torch.get_default_dtype())

    def resize_(self, tensor: torch.Tensor, size: Sequence[int], **_: Any) -> torch.Tensor:
        return resize(self._memory, tensor, size)


class Transfers:
    """Operators that move values, between devices or to the Python program."""

    def __init__(self, statistics: Statistics, recorder: Recorder) -> None:
        self._statistics = statistics
        self._recorder = recorder

    def copy_(self, destination: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        self._count(destination, source, non_blocking)
        _seen_from_host(destination).copy_(_seen_from_host(source))
        self._recorder.record(self.copy_, (destination, source), {}, destination)
        return destination

    def copy_from(self, source: torch.Tensor, destination: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        return self.copy_(destination, source, non_blocking)

    def read_scalar(self, tensor: torch.Tensor) -> Any:
        self._statistics.sync("aten::_local_scalar_dense")
        return host_view(tensor).item()

    def _count(self, destination: torch.Tensor, source: torch.Tensor, non_blocking: bool) -> None:
        if is_on_device(destination) and is_on_device(source):
            self._statistics.copies["move"] += 1
            return
        self._recorder.refuse_host_copy()
        direction = "upload" if is_on_device(destination) else "download"
        self._statistics.host_copy(direction, blocking=not non_blocking)


def _seen_from_host(tensor: torch.Tensor) -> torch.Tensor:
    return host_view(tensor) if is_on_device(tensor) else tensor


def _metadata_kernel(name: str) -> Callable[..., Any]:
    operator = find_operator(name)
    return lambda *args, **kwargs: operator.redispatch(CPU_KERNELS, *args, **kwargs)


def register(kernels: HostKernels) -> list[torch.library.Library]:
    """Connect the device. The libraries undo their registrations when they are collected: keep them."""
    library = torch.library.Library("aten", "IMPL")
    fallback = torch.library.Library("_", "IMPL")
    fallback.fallback(kernels.run, "PrivateUse1")
    factories = Factories(kernels.memory)
    transfers = Transfers(kernels.statistics, kernels.recorder)
    table: dict[str, Callable[..., Any]] = {
        "empty.memory_format": factories.empty,
        "empty_strided": factories.empty_strided,
        "resize_": factories.resize_,
        "copy_": transfers.copy_,
        "_copy_from": transfers.copy_from,
        "_local_scalar_dense": transfers.read_scalar,
        "_fused_sdp_choice": lambda *args, **kwargs: MATH_ATTENTION,
    }
    table |= {name: _metadata_kernel(name) for name in METADATA_OPERATORS}
    for name, kernel in table.items():
        library.impl(name, kernel, "PrivateUse1")
    return [library, fallback]

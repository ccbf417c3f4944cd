"""The `torch.npu` module of the simulated device: the part of torch_npu's surface that the project may use.

Names, arguments and meaning are those of torch_npu 2.13, which follows torch.cuda. One card, one thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import ModuleType

import torch

from tests.npu.simulated.graph import NPUGraph, graph
from tests.npu.simulated.kernels import HostKernels
from tests.npu.simulated.streams import Event, Stream
from tests.npu.simulated.tensors import check_device

NAME = "Ascend910B3"
Device = torch.device | str | int | None


def check(device: Device) -> None:
    """Raises RuntimeError for another card than number 0."""
    if device is not None:
        check_device(torch.device("npu", device) if isinstance(device, int) else torch.device(device))


class NpuModule(ModuleType):
    """`torch.npu`, over one set of kernels and its memory."""

    def __init__(self, kernels: HostKernels) -> None:
        super().__init__("torch.npu")
        self._memory = kernels.memory
        self._statistics = kernels.statistics
        self._recorder = kernels.recorder
        self._generator = kernels.generator
        self.Stream = partial(Stream, kernels.statistics)
        self.Event = partial(Event, kernels.statistics)
        self.NPUGraph = partial(NPUGraph, kernels.recorder, kernels.statistics)
        self.graph = graph
        self._stream = Stream(kernels.statistics)

    # ---- the card

    _initialized = True  # torch.utils.checkpoint looks here before it keeps the random state

    def is_available(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def set_device(self, device: Device) -> None:
        check(device)
        self._memory.enter_thread()

    def device(self, device: Device) -> AbstractContextManager[None]:
        check(device)
        return nullcontext()

    def get_device_name(self, device: Device = None) -> str:
        check(device)
        return NAME

    def synchronize(self, device: Device = None) -> None:
        check(device)
        self._statistics.sync("torch.npu.synchronize")

    # ---- types

    def is_bf16_supported(self) -> bool:
        return True

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16, torch.float32]

    # ---- memory

    def memory_allocated(self, device: Device = None) -> int:
        check(device)
        return self._memory.allocated

    def max_memory_allocated(self, device: Device = None) -> int:
        check(device)
        return self._memory.peak_allocated

    def memory_reserved(self, device: Device = None) -> int:
        check(device)
        return self._memory.reserved

    def max_memory_reserved(self, device: Device = None) -> int:
        check(device)
        return self._memory.peak_reserved

    def memory_stats(self, device: Device = None) -> dict[str, int]:
        check(device)
        memory = self._memory
        return {
            "allocated_bytes.all.current": memory.allocated,
            "allocated_bytes.all.peak": memory.peak_allocated,
            "active_bytes.all.current": memory.allocated,
            "active_bytes.all.peak": memory.peak_allocated,
            "reserved_bytes.all.current": memory.reserved,
            "reserved_bytes.all.peak": memory.peak_reserved,
            "allocation.all.allocated": memory.num_allocations,
            "num_ooms": memory.num_ooms,
            "num_alloc_retries": 0,
        }

    def mem_get_info(self, device: Device = None) -> tuple[int, int]:
        """(free, total)"""
        check(device)
        return self._memory.free, self._memory.capacity

    def set_per_process_memory_fraction(self, fraction: float, device: Device = None) -> None:
        check(device)
        if not 0 <= fraction <= 1:
            raise ValueError(f"Invalid fraction value: {fraction}. Allowed range: [0, 1]")
        self._memory.fraction = fraction

    def reset_peak_memory_stats(self, device: Device = None) -> None:
        check(device)
        self._memory.reset_peaks()

    def empty_cache(self) -> None:
        self._memory.release_cache()

    # ---- random numbers: the device has its own stream of them

    def manual_seed(self, seed: int) -> None:
        self._generator.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        self._generator.manual_seed(seed)

    def get_rng_state(self, device: Device = "npu") -> torch.Tensor:
        check(device)
        return self._generator.get_state()

    def set_rng_state(self, state: torch.Tensor, device: Device = "npu") -> None:
        check(device)
        self._generator.set_state(state)

    # ---- streams and graphs

    def current_stream(self, device: Device = None) -> Stream:
        return self._stream

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        outer, self._stream = self._stream, stream
        try:
            yield
        finally:
            self._stream = outer

    def is_current_stream_capturing(self) -> bool:
        return self._recorder.is_capturing

"""A simulated `npu` device, in pure Python: no compiler, no torch_npu, no CANN, no card.

Tensors live on torch's device type for third parties (PrivateUse1, renamed `npu`) in storages of their own over host
memory; arithmetic is the CPU's. It shows that a program is device-clean: every tensor on the right device, views and
updates in place right, memory within its bounds, no wait of the host where there must be none, graphs replayable.
It shows nothing of torch_npu's own code, of its kernels' numbers and limits, of speed, or of work that overlaps.

A process has one such device, for good: see `tests/npu/test_on_simulated_npu.py` for how tests get a process.
"""

from __future__ import annotations

import importlib.machinery
import sys
from dataclasses import dataclass
from types import ModuleType

import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from tests.npu.simulated import autocast, dispatch, storages
from tests.npu.simulated.graph import Recorder
from tests.npu.simulated.kernels import HostKernels
from tests.npu.simulated.memory import Memory
from tests.npu.simulated.statistics import Statistics
from tests.npu.simulated.surface import NpuModule

DEFAULT_CAPACITY = 1 << 30


class Hooks(torch._C._acc.PrivateUse1Hooks):
    """What torch asks a backend from C++."""

    def is_available(self) -> bool:
        return True

    def is_built(self) -> bool:
        return True

    def has_primary_context(self, device_index: int) -> bool:
        return device_index == 0


class Guard(torch._C._acc.DeviceGuard):
    """Switching between cards: there is one."""

    def type_(self) -> torch._C._autograd.DeviceType:  # type: ignore[override]  # the stub says Device
        return torch._C._autograd.DeviceType.PrivateUse1


@dataclass(frozen=True, slots=True)
class SimulatedNpu:
    """The device of this process, as tests see it."""

    module: NpuModule
    """`torch.npu`, with types."""
    memory: Memory
    statistics: Statistics
    libraries: tuple[torch.library.Library, ...]


def install(capacity: int = DEFAULT_CAPACITY) -> SimulatedNpu:
    """Make `npu` a device of this process, and `torch_npu` a module that can be imported. Once per process."""
    memory, statistics = Memory(capacity), Statistics()
    kernels = HostKernels(memory, statistics, Recorder(), torch.Generator())
    module = NpuModule(kernels)
    _setup_privateuseone_for_python_backend("npu", backend_module=module, hook=Hooks(), device_guard=Guard())
    sys.modules["torch.npu"] = module
    sys.modules["torch_npu"] = _torch_npu()
    libraries = (*dispatch.register(kernels), *autocast.register())
    storages.patch(memory)
    return SimulatedNpu(module, memory, statistics, libraries)


def _torch_npu() -> ModuleType:
    """An empty package: importing torch_npu adds `torch.npu`, which is there already."""
    module = ModuleType("torch_npu")
    module.__spec__ = importlib.machinery.ModuleSpec("torch_npu", loader=None)
    module.__dict__["__version__"] = "simulated"
    return module

"""The device layer: which device, which precision, how much memory, how fast.

Vendor calls (`torch.cuda`, `torch.npu`, `torch_npu`) stand here and in `lm.ops`, nowhere else. torch loads an
installed torch_npu by itself, and fails with it, unless `TORCH_DEVICE_BACKEND_AUTOLOAD=0` is set before the first
`import torch`: entry points do that.
"""

from __future__ import annotations

from lm.device.bandwidth import peak_bandwidth
from lm.device.detect import DeviceChoice, resolve_device
from lm.device.memory import MemoryFigures, limit_memory, memory_figures, reset_peak_memory
from lm.device.precision import DtypeChoice, choose_dtype
from lm.device.runtime import random_state, restore_random_state, seed_everything, synchronize

__all__ = [
    "DeviceChoice",
    "DtypeChoice",
    "MemoryFigures",
    "choose_dtype",
    "limit_memory",
    "memory_figures",
    "peak_bandwidth",
    "random_state",
    "reset_peak_memory",
    "resolve_device",
    "restore_random_state",
    "seed_everything",
    "synchronize",
]

"""How many bytes a second a device can read from its memory: what decoding is measured against."""

from __future__ import annotations

import time
from typing import Literal

import torch

from lm.device.runtime import synchronize

PROBE_BYTES = 256 << 20
"""Well above the caches of one processor."""
PROBE_READS = 5

NPU_BANDWIDTH = (
    ("Ascend910_93", 1.6e12),
    ("Ascend910B4", 0.8e12),
    ("Ascend910B", 1.6e12),
    ("Ascend310P", 0.204e12),
    ("Ascend950PR", 1.6e12),
    ("Ascend950DT", 4.0e12),
)
"""Bytes/s by the start of the device's name. No vendor data sheet was at hand, so these are common figures."""


def peak_bandwidth(device: torch.device) -> tuple[float, Literal["measured", "assumed"]]:
    """Bytes/s, and whether they were measured now (under 0.3 s) or assumed from the device's name and memory."""
    if device.type == "npu":
        module = torch.get_device_module(device)
        return assumed_bandwidth(module.get_device_name(device), module.mem_get_info(device)[1]), "assumed"
    return _measured(device), "measured"


def assumed_bandwidth(name: str, total_memory: int) -> float:
    for prefix, bandwidth in NPU_BANDWIDTH:
        if name.startswith(prefix):
            return bandwidth
    return 1.6e12 if total_memory > 40e9 else 0.8e12


def _measured(device: torch.device) -> float:
    """The fastest of a few sums over a buffer, with all of torch's threads."""
    buffer = torch.ones(PROBE_BYTES // 4, device=device)
    fastest = float("inf")
    for _ in range(PROBE_READS):
        synchronize(device)
        started = time.perf_counter()
        buffer.sum()
        synchronize(device)
        fastest = min(fastest, time.perf_counter() - started)
    return PROBE_BYTES / fastest

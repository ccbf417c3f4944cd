"""How much memory this process uses and how much there is, in bytes.

On an accelerator these are the caching allocator's figures. The CPU has no such allocator: there they are the
process's resident set and the memory of the machine, or of the control group (a container) where that is less.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

import torch

PROC = Path("/proc")
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryFigures:
    allocated: int
    """In live tensors."""
    reserved: int
    """Held by the allocator, live or not."""
    peak_active: int
    """Peaks are since the start or the last `reset_peak_memory`. Active: not yet reusable, as torch counts it."""
    peak_allocated: int
    peak_reserved: int
    total: int
    free: int


def memory_figures(device: torch.device) -> MemoryFigures:
    if device.type == "cpu":
        return _host_figures()
    module = torch.get_device_module(device)
    free, total = module.mem_get_info(device)
    peak_allocated = module.max_memory_allocated(device)
    return MemoryFigures(
        allocated=module.memory_allocated(device),
        reserved=module.memory_reserved(device),
        peak_active=module.memory_stats(device).get("active_bytes.all.peak", peak_allocated),
        peak_allocated=peak_allocated,
        peak_reserved=module.max_memory_reserved(device),
        total=total,
        free=free,
    )


def reset_peak_memory(device: torch.device) -> None:
    """Let the peaks start anew from what is in use now. Where a sandbox forbids that, the CPU's go on from the start."""
    if device.type == "cpu":
        with contextlib.suppress(OSError):
            (PROC / "self/clear_refs").write_text("5", encoding="ascii")  # proc(5): resets VmHWM
    else:
        torch.get_device_module(device).reset_peak_memory_stats(device)


def limit_memory(device: torch.device, fraction: float) -> None:
    """Let this process take no more than so much of the device's memory: what asks for more gets OutOfMemoryError.

    It binds what torch allocates. The CPU's memory has no such limit, and stays without one.
    """
    if device.type != "cpu":
        torch.get_device_module(device).set_per_process_memory_fraction(fraction, device)


def _host_figures() -> MemoryFigures:
    status, machine = _read_table(PROC / "self/status"), _read_table(PROC / "meminfo")
    resident, peak = status["VmRSS"], status["VmHWM"]
    total, free = machine["MemTotal"], machine["MemAvailable"]
    limit, used = _cgroup_limit()
    if limit < total:
        total, free = limit, min(free, limit - used)
    return MemoryFigures(
        allocated=resident,
        reserved=resident,
        peak_active=peak,
        peak_allocated=peak,
        peak_reserved=peak,
        total=total,
        free=max(0, free),
    )


def _read_table(path: Path) -> dict[str, int]:
    """Bytes by name from lines such as `VmRSS:  1780 kB`."""
    rows = (line.split() for line in path.read_text(encoding="ascii", errors="replace").splitlines())
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows if len(row) == 3 and row[2] == "kB"}


def _cgroup_limit() -> tuple[int, int]:
    """Limit and use of the control group (version 2, else 1); files that the kernel can drop do not count as use."""
    for folder, limit_name, used_name, droppable in (
        (CGROUP, "memory.max", "memory.current", "inactive_file"),
        (CGROUP / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        limit = _read(folder / limit_name)
        if limit.isdigit():
            statistics = dict(line.split() for line in _read(folder / "memory.stat").splitlines())
            return int(limit), int(_read(folder / used_name)) - int(statistics.get(droppable, 0))
    return 1 << 63, 0


def _read(path: Path) -> str:
    return path.read_text(encoding="ascii").strip() if path.is_file() else ""

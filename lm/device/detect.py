"""Which device to use, and why. Whatever state torch_npu is in, the CPU stays usable."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import re
import sys
from dataclasses import dataclass

import torch

from lm.device.processor import this_processor
from lm.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceChoice:
    device: torch.device
    """With an index, unless it is the CPU."""
    name: str
    """What the hardware calls itself."""
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Accelerators:
    """How many devices of one kind can be used, and what was found."""

    count: int
    finding: str


def resolve_device(name: str) -> DeviceChoice:
    """The device that `auto`, `cpu`, `cuda`, `cuda:N`, `npu` or `npu:N` means; it becomes this thread's current one.

    `auto` takes CUDA, else an NPU, else the CPU. Raises UserError, with what was found, when a device is asked for
    that is not there.
    """
    match = re.fullmatch(r"(auto|cpu)|(cuda|npu)(?::(\d+))?", name)
    if match is None:
        raise UserError(f"device: must be auto, cpu, cuda, cuda:N, npu or npu:N (got {name!r})", param="device")
    if name == "cpu":
        return _cpu("asked for")
    if name == "auto":
        return _auto()
    kind, index = match[2], int(match[3] or 0)
    found = _find(kind)
    if index >= found.count:
        raise UserError(f"device: {name!r} cannot be used: {found.finding}. `auto` takes what there is", param="device")
    return _accelerator(kind, index, f"asked for; {found.finding}")


def _auto() -> DeviceChoice:
    findings = []
    for kind in ("cuda", "npu"):  # in this order: torch_npu refuses to load beside a usable CUDA
        found = _find(kind)
        if found.count:
            return _accelerator(kind, 0, f"auto: {found.finding}")
        findings.append(found.finding)
    return _cpu(f"auto: {'; '.join(findings)}")


def _cpu(reason: str) -> DeviceChoice:
    return DeviceChoice(device=torch.device("cpu"), name=this_processor().name, reason=reason)


def _accelerator(kind: str, index: int, reason: str) -> DeviceChoice:
    device = torch.device(kind, index)
    module = torch.get_device_module(device)
    module.set_device(device)  # the context is per thread; without it work on npu:1 fails with error 107002
    return DeviceChoice(device=device, name=module.get_device_name(device), reason=reason)


def _find(kind: str) -> Accelerators:
    return _find_cuda() if kind == "cuda" else _find_npu()


def _find_cuda() -> Accelerators:
    if torch.cuda.is_available():
        return _counted("CUDA", torch.cuda.device_count())
    built = torch.backends.cuda.is_built()
    return Accelerators(count=0, finding="no CUDA device visible" if built else "torch is built without CUDA")


def _find_npu() -> Accelerators:
    if importlib.util.find_spec("torch_npu") is None:
        return Accelerators(count=0, finding="torch_npu is not installed")
    try:
        with contextlib.redirect_stdout(sys.stderr):  # it warns on stdout
            importlib.import_module("torch_npu")
    except Exception as error:  # noqa: BLE001 (a missing part of CANN makes it raise a bare Exception)
        return Accelerators(count=0, finding=f"torch_npu does not load: {type(error).__name__}: {error}")
    module = torch.get_device_module("npu")
    if not module.is_available():
        return Accelerators(count=0, finding="torch_npu loaded, no NPU visible")
    return _counted("NPU", module.device_count())


def _counted(kind: str, count: int) -> Accelerators:
    return Accelerators(count=count, finding=f"{count} {kind} device{'s' if count > 1 else ''} visible")

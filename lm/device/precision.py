"""Which floating-point type to compute in, and why."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lm.device.processor import this_processor
from lm.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Measured on an EPYC with avx512_bf16, linears of a 135M llama, bf16 against fp32: 2.3 times as fast at one token,
# 3.9 at 8, 6 at 256. Without such instructions bf16 is about 10 times slower than fp32.
FAST_BF16_FLAGS = ("amx_bf16", "avx512_bf16")


@dataclass(frozen=True, slots=True, kw_only=True)
class DtypeChoice:
    dtype: torch.dtype
    name: str
    """`fp32`, `bf16` or `fp16`."""
    reason: str


def choose_dtype(name: str, device: torch.device) -> DtypeChoice:
    """The type that `auto`, `fp32`, `bf16` or `fp16` means on `device`.

    `auto` is bf16 where the device is fast at it, else fp32. Raises UserError for another name, and for a type that
    the device cannot compute in.
    """
    if name == "auto":
        chosen, reason = _auto(device)
        return DtypeChoice(dtype=DTYPES[chosen], name=chosen, reason=f"auto: {reason}")
    if name not in DTYPES:
        raise UserError(f"dtype: must be auto, {', '.join(DTYPES)} (got {name!r})", param="dtype")
    if name == "bf16" and not _computes_bf16(device):
        raise UserError(f"dtype: {device} has no bf16; use auto, fp32 or fp16 (got {name!r})", param="dtype")
    return DtypeChoice(dtype=DTYPES[name], name=name, reason="asked for")


def _auto(device: torch.device) -> tuple[str, str]:
    if device.type != "cpu":
        if _computes_bf16(device):
            return "bf16", f"{device.type} computes in bf16"
        return "fp32", f"this {device.type} device has no bf16; fp16 is there for the asking"
    for flag in FAST_BF16_FLAGS:
        if flag in this_processor().flags:
            return "bf16", f"the processor has {flag}"
    return "fp32", f"the processor has neither {' nor '.join(FAST_BF16_FLAGS)}, without which bf16 is slower"


def _computes_bf16(device: torch.device) -> bool:
    if device.type == "cpu":
        return True
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.get_device_module(device).is_bf16_supported())

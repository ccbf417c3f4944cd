"""What the processor calls itself and what it can do, as Linux says."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True, slots=True, kw_only=True)
class Processor:
    name: str
    flags: frozenset[str]
    """Instruction sets in Linux's spelling; empty where they are not known."""


def this_processor() -> Processor:
    try:
        return parse_cpuinfo(CPUINFO.read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        return parse_cpuinfo("")


def parse_cpuinfo(text: str) -> Processor:
    """Read the first processor's entry. x86 lists `flags`, Arm `Features` and no name."""
    entry: dict[str, str] = {}
    for line in text.splitlines():
        key, separator, value = line.partition(":")
        if separator:
            entry.setdefault(key.strip(), value.strip())
    flags = entry.get("flags", entry.get("Features", ""))
    return Processor(name=entry.get("model name") or platform.machine(), flags=frozenset(flags.split()))

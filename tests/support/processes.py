"""Processes as the kernel shows them: which are there, and whose children they are."""

from __future__ import annotations

from pathlib import Path


def children_of(pid: int) -> list[int]:
    """Direct children, those that live."""
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]
    return [child for child in pids if (fields := _stat(child)) and int(fields[1]) == pid and fields[0] != "Z"]


def is_alive(pid: int) -> bool:
    """A zombie is not."""
    fields = _stat(pid)
    return bool(fields) and fields[0] != "Z"


def command_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().rstrip("\0").split("\0")


def _stat(pid: int) -> list[str]:
    """State, parent and the rest of /proc/PID/stat behind the name; nothing for a process that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []

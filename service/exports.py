"""Checkpoints as GGUF files, written by a process of their own into `exports/` of their run, and removed with them."""

from __future__ import annotations

import asyncio
import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lm.errors import UserError
from lm.gguf_export import GgufType
from service.jobs.trainer_process import CPU_NICENESS, trainer_environment
from service.registry import Entry

FOLDER = "exports"
State = Literal["none", "running", "ready", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    status: State
    path: Path
    """Where the file is, or will be."""
    problem: str | None = None


class Exports:
    """Exports go one by one; use on one event loop."""

    def __init__(self) -> None:
        self._tasks: dict[Path, asyncio.Task[None]] = {}
        self._problems: dict[Path, str] = {}
        self._turn = asyncio.Lock()

    def find(self, entry: Entry, kind: GgufType) -> Export:
        """Raises UserError for a base model."""
        path = _path(entry, kind)
        if path in self._tasks:
            return Export(status="running", path=path)
        if path.is_file():
            return Export(status="ready", path=path)
        problem = self._problems.get(path)
        return Export(status="none" if problem is None else "failed", path=path, problem=problem)

    def start(self, entry: Entry, kind: GgufType) -> Export:
        """Begin to write the file unless it is there or under way; one that failed is tried again."""
        found = self.find(entry, kind)
        if found.status in ("running", "ready"):
            return found
        self._problems.pop(found.path, None)
        task = asyncio.create_task(self._write(entry, kind, found.path))
        self._tasks[found.path] = task
        task.add_done_callback(lambda _: self._tasks.pop(found.path, None))
        return self.find(entry, kind)

    async def close(self) -> None:
        for task in (tasks := [*self._tasks.values()]):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _write(self, entry: Entry, kind: GgufType, path: Path) -> None:
        folder = entry.adapter_dir or entry.base_dir
        words = [str(folder), str(path), "--type", kind, "--name", entry.id]
        words += [] if entry.adapter_dir is None else ["--base", str(entry.base_dir)]
        async with self._turn:
            try:
                path.parent.mkdir(exist_ok=True)
                mistake = await _run(words)
            except OSError as error:
                mistake = f"the process could not be started: {error.strerror}"
        if mistake is not None:
            for place in (folder.parent.parent, entry.base_dir.parent):  # clients are told no paths of ours
                mistake = mistake.replace(f"{place}/", "")
            self._problems[path] = mistake


def exported(folder: Path) -> list[Path]:
    """What was exported of the checkpoint in `folder`."""
    return [*(folder.parent.parent / FOLDER).glob(f"{folder.name}.*.gguf")]


def _path(entry: Entry, kind: GgufType) -> Path:
    folder = entry.adapter_dir or entry.base_dir
    if entry.job_id is None:
        raise UserError(f"model: {entry.id} is a base model; only checkpoints of jobs are exported", param="model")
    return folder.parent.parent / FOLDER / f"{folder.name}.{kind}.gguf"


async def _run(words: list[str]) -> str | None:
    """What went wrong, if anything did."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "trainer.export", *words),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env=trainer_environment(),
    )
    try:
        with suppress(ProcessLookupError):
            os.setpriority(os.PRIO_PROCESS, process.pid, CPU_NICENESS)
        _, told = await process.communicate()
    except asyncio.CancelledError:
        process.kill()
        await process.wait()
        raise
    if process.returncode == 0:
        return None
    last = told.decode("utf-8", "replace").strip().splitlines()[-1:]
    return last[0].removeprefix("tuneserve: error: ") if last else f"it ended with exit code {process.returncode}"

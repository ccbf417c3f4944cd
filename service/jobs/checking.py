"""Data files read to their end, so that a mistake in them is told before a trainer starts.

A large file would hold up the event loop for its whole length, also from a thread: it is checked in another process.
`python -m service.jobs.checking` reads [[path, name], ...] as JSON from standard input and writes the mistake, or
null, as JSON to standard output.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from lm.errors import UserError
from service.jobs.trainer_process import trainer_environment
from trainer.data.records import DataError, read_records

DataFile = tuple[Path, str]
"""A path, and what error messages call it."""

SMALL_BYTES = 4 << 20
"""Files of up to this size together take about a tenth of a second."""


def are_small(files: Iterable[DataFile]) -> bool:
    return sum(path.stat().st_size for path, _ in files if path.exists()) <= SMALL_BYTES


async def check_files_aside(files: Sequence[DataFile], *, param: str) -> None:
    """Read every record without holding up the event loop.

    Raises UserError with the file, the record and the line, and ChildProcessError when the process that reads dies.
    """
    mistake = await (asyncio.to_thread(find_mistake, files) if are_small(files) else _find_mistake_apart(files))
    if mistake is not None:
        raise UserError(f"{param}: {mistake}", param=param)


def find_mistake(files: Iterable[DataFile]) -> str | None:
    try:
        for path, name in files:
            for _ in read_records(path, name=name):
                pass
    except DataError as error:
        return str(error)
    return None


async def _find_mistake_apart(files: Iterable[DataFile]) -> str | None:
    """In another process, which ends when this is cancelled."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "service.jobs.checking"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=trainer_environment(),
    )
    try:
        answer, _ = await process.communicate(json.dumps([[str(path), name] for path, name in files]).encode())
    except asyncio.CancelledError:
        process.kill()
        await process.wait()
        raise
    if process.returncode:
        raise ChildProcessError(f"the check of the data ended with exit code {process.returncode}")
    mistake: str | None = json.loads(answer)
    return mistake


def main() -> None:
    json.dump(find_mistake((Path(path), name) for path, name in json.load(sys.stdin)), sys.stdout)


if __name__ == "__main__":
    main()

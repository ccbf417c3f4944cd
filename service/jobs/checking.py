"""Data files read to their end, so that a mistake in them is told before a trainer starts.

A large file would hold up the event loop for its whole length, also from a thread: it is checked in another process.
So is Parquet of any size, since a damaged file can take more than one thread with it. `python -m service.jobs.checking`
reads [[[path, name], ...], options, any_columns] as JSON from standard input and writes the mistake, or null, as JSON to standard
output.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from lm.errors import UserError
from service.jobs.trainer_process import trainer_environment
from trainer.data.errors import DataError
from trainer.data.options import ReadOptions
from trainer.data.records import DEFAULT_OPTIONS, read_records
from trainer.data.sources import find_source, is_unknown_table, read_values

DataFile = tuple[Path, str]
"""A path, and what error messages call it."""

SMALL_BYTES = 4 << 20
"""Files of up to this size together take about a tenth of a second."""


def are_small(files: Iterable[DataFile]) -> bool:
    return sum(path.stat().st_size for path, _ in files if path.exists()) <= SMALL_BYTES


def are_harmless(files: Iterable[DataFile], reading: ReadOptions) -> bool:
    """Whether they may be read in this process."""
    present = [(path, name) for path, name in files if path.is_file()]
    return are_small(present) and all(find_source(path, name, reading) != "parquet" for path, name in present)


async def check_files_aside(
    files: Sequence[DataFile], *, param: str, reading: ReadOptions = DEFAULT_OPTIONS, any_columns: bool = False
) -> None:
    """Read every record without holding up the event loop. With `any_columns` a table (CSV, Parquet) may have columns
    of no known format, as long as it can be read: what they mean is said later.

    Raises UserError with the file, the record and the line, and ChildProcessError when the process that reads dies.
    """
    if are_harmless(files, reading):
        mistake = await asyncio.to_thread(find_mistake, files, reading, any_columns)
    else:
        mistake = await _find_mistake_apart(files, reading, any_columns)
    if mistake is not None:
        raise UserError(f"{param}: {mistake}", param=param)


def exhaust(items: Iterable[object]) -> None:
    for _ in items:
        pass


def find_mistake(files: Iterable[DataFile], reading: ReadOptions, any_columns: bool) -> str | None:
    try:
        for path, name in files:
            if any_columns and is_unknown_table(path, name, reading):
                exhaust(read_values(path, name, reading))
            else:
                exhaust(read_records(path, name=name, options=reading))
    except DataError as error:
        return str(error)
    return None


async def _find_mistake_apart(files: Iterable[DataFile], reading: ReadOptions, any_columns: bool) -> str | None:
    """In another process, which ends when this is cancelled."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "service.jobs.checking"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=trainer_environment(),
    )
    question = json.dumps([[[str(path), name] for path, name in files], asdict(reading), any_columns])
    try:
        answer, _ = await process.communicate(question.encode())
    except asyncio.CancelledError:
        process.kill()
        await process.wait()
        raise
    if process.returncode:
        raise ChildProcessError(f"the check of the data ended with exit code {process.returncode}")
    mistake: str | None = json.loads(answer)
    return mistake


def main() -> None:
    files, reading, any_columns = json.load(sys.stdin)
    named = [(Path(path), name) for path, name in files]
    json.dump(find_mistake(named, ReadOptions(**reading), any_columns), sys.stdout)


if __name__ == "__main__":
    main()

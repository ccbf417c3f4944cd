"""From what a request says about its data to files that a trainer can read.

Inline records and small files are checked here, so that the request itself is refused; uploaded files were checked when
they came; larger ones are left to the job. Nothing is written before everything is checked.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm.errors import UserError
from service.files import FINE_TUNE, FileStore
from service.jobs.checking import DataFile, are_small, check_files_aside
from service.schemas.finetune import DatasetRequest
from service.settings import Settings
from trainer.data.options import ReadOptions
from trainer.data.records import DEFAULT_OPTIONS, check_records

INLINE_FILE = "records.jsonl"
DATA_FILES = "dataset.data_files"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingData:
    files: tuple[str, ...]
    """Relative to the home folder."""
    file_id: str | None
    is_checked: bool


async def take_dataset(
    request: DatasetRequest,
    *,
    job_id: str,
    settings: Settings,
    files: FileStore,
    reading: ReadOptions = DEFAULT_OPTIONS,
) -> TrainingData:
    """Raises UserError that names the record, the line or the path; NotFoundError for an unknown file id."""
    if request.records is not None:
        await asyncio.to_thread(_check_inline, request.records, reading)
        path = settings.runs_dir / job_id / INLINE_FILE
        await asyncio.to_thread(_write_jsonl, path, request.records)
        return TrainingData(files=(_relative(path, settings),), file_id=None, is_checked=True)
    if request.file_id is not None:
        return await _take_upload(request.file_id, settings=settings, files=files, reading=reading)
    named = [(find_data_file(settings.data_dir, name), name) for name in request.data_files or ()]
    is_checked = await _check_small(named, param=DATA_FILES, reading=reading)
    root = settings.data_dir.resolve()
    relative = tuple(f"data/{path.relative_to(root)}" for path, _ in named)
    return TrainingData(files=relative, file_id=None, is_checked=is_checked)


async def _take_upload(file_id: str, *, settings: Settings, files: FileStore, reading: ReadOptions) -> TrainingData:
    """It was checked when it came, and is again as this request wants it read, if it is small or read differently."""
    stored = files.get(file_id, param="dataset.file_id")
    if stored.purpose != FINE_TUNE:
        message = f"dataset.file_id: {stored.id} was uploaded with the purpose {stored.purpose}, not {FINE_TUNE}"
        raise UserError(message, param="dataset.file_id")
    path = files.path(stored.id)
    is_checked = await _check_small([(path, stored.filename)], param="dataset.file_id", reading=reading)
    is_checked = is_checked or reading == DEFAULT_OPTIONS
    return TrainingData(files=(_relative(path, settings),), file_id=stored.id, is_checked=is_checked)


async def _check_small(named: Sequence[DataFile], *, param: str, reading: ReadOptions) -> bool:
    """Whether the files were checked: what is larger is left to the job."""
    is_small = are_small(named)
    if is_small:
        await check_files_aside(named, param=param, reading=reading)
    return is_small


def discard_dataset(job_id: str, settings: Settings) -> None:
    """Remove what `take_dataset` wrote for a job that then was not created."""
    folder = settings.runs_dir / job_id
    if folder.is_dir():
        (folder / INLINE_FILE).unlink(missing_ok=True)
        folder.rmdir()


def find_data_file(data_dir: Path, name: str) -> Path:
    """The file that `name`, relative to the data folder, means. Raises UserError for anything outside of it."""
    try:
        root = data_dir.resolve()
        path = (root / name).resolve()
        is_inside = ".." not in Path(name).parts and not Path(name).is_absolute() and path.is_relative_to(root)
        is_file = is_inside and path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # too long; NUL or half characters; a loop of links
        raise UserError(f"{DATA_FILES}: {name!r:.200} is not a path: {error}", param=DATA_FILES) from error
    if not is_inside:
        raise UserError(
            f"{DATA_FILES}: {name!r:.200} is outside of the data folder; put the file there, or upload it to /v1/files",
            param=DATA_FILES,
        )
    if not is_file:
        raise UserError(f"{DATA_FILES}: there is no file {name!r:.200} in the data folder", param=DATA_FILES)
    return path


def _check_inline(records: list[Any], reading: ReadOptions) -> None:
    check_records(records, param="dataset.records", options=reading)


def _write_jsonl(path: Path, records: list[Any]) -> None:
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def _relative(path: Path, settings: Settings) -> str:
    return str(path.relative_to(settings.home))

"""From what a request says about its data to files that a trainer can read.

Inline records and small files are checked here, so that the request itself is refused; uploaded files were checked when
they came; larger ones and those of the hub are left to the job. Nothing is written before everything is checked.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm.errors import UserError
from service.files import FINE_TUNE, FileStore
from service.jobs.checking import DataFile, are_small, check_files_aside
from service.schemas.datasets import DatasetRequest
from service.settings import Settings
from trainer.data.options import ReadOptions
from trainer.data.records import DEFAULT_OPTIONS, WRONG_RECIPE, check_records, to_record
from trainer.option_groups import DatasetConfig

HELD_OUT = "validation"
"""How the held-out dataset is called among the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TakenDataset:
    config: DatasetConfig
    """As the trainer is told it, with paths relative to the home folder."""
    file_id: str | None = None
    is_checked: bool = False
    records: Sequence[Any] | None = None
    """What is still to be written to the file that `config` names."""


class DatasetTaker:
    """Finds and checks the data of one job."""

    def __init__(
        self, *, settings: Settings, files: FileStore, folder: Path, reading: ReadOptions, pairs: bool = False
    ) -> None:
        """Inline records go into `folder`, which lies in the home of the service. `pairs`: preferences are expected."""
        self._pairs = pairs
        self._settings = settings
        self._files = files
        self._folder = folder
        self._reading = reading

    async def take(self, requests: Mapping[str, DatasetRequest]) -> dict[str, TakenDataset]:
        """By the names that error messages call them; inline records are written once all are found to be right.

        Raises UserError that names the record, the line or the path; NotFoundError for an unknown file id.
        """
        taken = {where: await self._take_one(request, where) for where, request in requests.items()}
        inline = [one for one in taken.values() if one.records is not None]
        await asyncio.to_thread(self._write, inline)
        return taken

    async def _take_one(self, request: DatasetRequest, where: str) -> TakenDataset:
        reading = request.reading(self._reading)
        if request.hub_id is not None:
            return TakenDataset(config=request.in_files(None))
        if request.records is not None:
            param = f"{where}.records"
            await asyncio.to_thread(_check_inline, request.records, param, reading, self._pairs)
            path = self._relative(self._folder / inline_name(where))
            return TakenDataset(config=request.in_files((path,)), is_checked=True, records=request.records)
        if request.file_id is not None:
            return await self._take_upload(request, request.file_id, f"{where}.file_id", reading)
        param = f"{where}.data_files"
        data_dir = self._settings.data_dir
        named = [(find_data_file(data_dir, name, param), name) for name in request.data_files or ()]
        is_checked = await _check_small(named, param=param, reading=reading)
        relative = tuple(f"data/{path.relative_to(data_dir.resolve())}" for path, _ in named)
        return TakenDataset(config=request.in_files(relative), is_checked=is_checked)

    async def _take_upload(
        self, request: DatasetRequest, file_id: str, param: str, reading: ReadOptions
    ) -> TakenDataset:
        """It was checked when it came, and is again as this request wants it read, if it is small or read differently."""
        stored = self._files.get(file_id, param=param)
        if stored.purpose != FINE_TUNE:
            message = f"{param}: {stored.id} was uploaded with the purpose {stored.purpose}, not {FINE_TUNE}"
            raise UserError(message, param=param)
        path = self._files.path(stored.id)
        is_checked = await _check_small([(path, stored.filename)], param=param, reading=reading)
        is_checked = is_checked or reading == DEFAULT_OPTIONS
        config = request.in_files((self._relative(path),))
        return TakenDataset(config=config, file_id=stored.id, is_checked=is_checked)

    def _write(self, inline: Iterable[TakenDataset]) -> None:
        for taken in inline:
            assert taken.config.data_files is not None  # `_take_one` named the file
            path = self._settings.home / taken.config.data_files[0]
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(record) + "\n" for record in taken.records or ())

    def _relative(self, path: Path) -> str:
        return str(path.relative_to(self._settings.home))


def _check_inline(records: Sequence[Any], param: str, reading: ReadOptions, pairs: bool) -> None:
    check_records(records, param=param, options=reading)
    for number, value in enumerate(records):
        record = to_record(value, f"{param}, record {number + 1}", options=reading)
        if bool(record.rejected) != pairs:
            raise UserError(f"{record.where}: {WRONG_RECIPE[pairs]}", param=f"{param}.{number}")


def inline_name(where: str) -> str:
    """The file in the run folder that holds the inline records of the dataset that is called `where`."""
    if where == HELD_OUT:
        return f"{HELD_OUT}.jsonl"
    return f"records{where.removeprefix('dataset').replace('.', '-')}.jsonl"


async def _check_small(named: Sequence[DataFile], *, param: str, reading: ReadOptions) -> bool:
    """Whether the files were checked: what is larger is left to the job."""
    is_small = are_small(named)
    if is_small:
        await check_files_aside(named, param=param, reading=reading)
    return is_small


def find_data_file(data_dir: Path, name: str, param: str) -> Path:
    """The file that `name`, relative to the data folder, means. Raises UserError for anything outside of it."""
    try:
        root = data_dir.resolve()
        path = (root / name).resolve()
        is_inside = ".." not in Path(name).parts and not Path(name).is_absolute() and path.is_relative_to(root)
        is_file = is_inside and path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # too long; NUL or half characters; a loop of links
        raise UserError(f"{param}: {name!r:.200} is not a path: {error}", param=param) from error
    if not is_inside:
        raise UserError(
            f"{param}: {name!r:.200} is outside of the data folder; put the file there, or upload it to /v1/files",
            param=param,
        )
    if not is_file:
        raise UserError(f"{param}: there is no file {name!r:.200} in the data folder", param=param)
    return path

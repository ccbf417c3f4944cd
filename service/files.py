"""Uploaded files: bytes in the files/ folder, the rest in the database. A file is there whole or not at all."""

from __future__ import annotations

import asyncio
import io
import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from lm.errors import NotFoundError
from service.database import Database
from service.jobs.checking import check_files_aside
from service.jobs.job import new_id

Purpose = Literal["fine-tune", "assistants", "batch", "vision", "user_data", "evals"]
"""What a client may upload a file for."""
FilePurpose = Purpose | Literal["fine-tune-results"]
FINE_TUNE: Purpose = "fine-tune"
RESULTS: FilePurpose = "fine-tune-results"
"""Of files that jobs made."""
UPLOADING = ".upload."
STILL_THERE = "(expires_at IS NULL OR expires_at > ?)"
UNUSED = (
    "NOT EXISTS (SELECT 1 FROM jobs, json_each(jobs.file_ids) AS used WHERE used.value = files.id"
    " AND jobs.status IN ('validating_files', 'queued', 'running'))"
)
KEPT_ENDINGS = (".csv", ".parquet", ".txt")
"""Where a data file is no JSON its name says so, to the trainer too, who sees nothing but the path."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    id: str
    filename: str
    """As the client called it; never a path of ours."""
    purpose: FilePurpose
    bytes: int
    created_at: float
    expires_at: float | None = None
    """From then on it is not there; its bytes stay as long as a job that is not over needs them."""


class FileStore:
    def __init__(self, database: Database, folder: Path) -> None:
        """Removes what an upload left behind that a crash of the service interrupted."""
        self.database = database
        self.folder = folder
        for path in folder.glob(f"{UPLOADING}*"):
            path.unlink()
        self.remove_expired()

    async def take(
        self, source: BinaryIO, *, filename: str, purpose: Purpose, lifetime_s: int | None = None
    ) -> StoredFile:
        """Keep what `source` holds, for some time or for good. Training data is checked to its end: raises UserError
        and keeps nothing."""
        self.remove_expired()
        path = await asyncio.to_thread(self._copy, source)
        try:
            if purpose == FINE_TUNE:
                await check_files_aside([(path, filename)], param="file", any_columns=True)
            return self._add(path, new_id("file-"), filename=filename, purpose=purpose, lifetime_s=lifetime_s)
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    async def keep(self, data: bytes, *, file_id: str, filename: str, purpose: FilePurpose) -> StoredFile:
        """Keep a file that the service made; with an id that is there already, nothing changes."""
        if self._row(file_id) is not None:
            return self.get(file_id)
        path = await asyncio.to_thread(self._copy, io.BytesIO(data))
        try:
            return self._add(path, file_id, filename=filename, purpose=purpose)
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    def _copy(self, source: BinaryIO) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self.folder, prefix=UPLOADING, delete=False) as file:
            try:
                shutil.copyfileobj(source, file, 1 << 20)
                file.flush()
                os.fsync(file.fileno())
            except BaseException:
                Path(file.name).unlink()
                raise
        return Path(file.name)

    def _add(
        self, copy: Path, file_id: str, *, filename: str, purpose: FilePurpose, lifetime_s: int | None = None
    ) -> StoredFile:
        now = time.time()
        stored = StoredFile(
            id=file_id,
            filename=filename,
            purpose=purpose,
            bytes=copy.stat().st_size,
            created_at=now,
            expires_at=None if lifetime_s is None else now + lifetime_s,
        )
        final = copy.rename(self._path(stored))
        try:
            self.database.insert("files", **asdict(stored))
        except BaseException:
            final.unlink()
            raise
        return stored

    def get(self, file_id: str, *, param: str = "file_id") -> StoredFile:
        """Raises NotFoundError, also for a file that has expired."""
        row = self._row(file_id)
        if row is None:
            raise NotFoundError(f"there is no file {file_id!r:.80}; GET /v1/files lists the files", param=param)
        return _file(row)

    def _row(self, file_id: str) -> sqlite3.Row | None:
        return self.database.row(f"SELECT * FROM files WHERE id = ? AND {STILL_THERE}", file_id, time.time())

    def path(self, file_id: str) -> Path:
        """Raises NotFoundError."""
        return self._path(self.get(file_id))

    def _path(self, stored: StoredFile) -> Path:
        ending = Path(stored.filename).suffix.lower()
        return self.folder / (stored.id + (ending if ending in KEPT_ENDINGS else ""))

    def page(
        self, *, limit: int, after: str | None = None, purpose: str | None = None, ascending: bool = False
    ) -> tuple[list[StoredFile], bool]:
        """Newest first unless `ascending`, and whether there are more. Raises NotFoundError for `after`."""
        conditions: list[str] = [STILL_THERE]
        parameters: list[str | float] = [time.time()]
        if after is not None:
            self.get(after)
            conditions.append(f"seq {'>' if ascending else '<'} (SELECT seq FROM files WHERE id = ?)")
            parameters.append(after)
        if purpose is not None:
            conditions.append("purpose = ?")
            parameters.append(purpose)
        order = "ASC" if ascending else "DESC"
        rows = self.database.rows(
            f"SELECT * FROM files WHERE {' AND '.join(conditions)} ORDER BY seq {order} LIMIT ?", *parameters, limit + 1
        )
        return [_file(row) for row in rows[:limit]], len(rows) > limit

    def delete(self, file_id: str) -> None:
        """Raises NotFoundError."""
        self._remove(self.get(file_id))

    def discard(self, file_ids: Iterable[str]) -> None:
        """Remove those that are there."""
        for file_id in file_ids:
            if (row := self._row(file_id)) is not None:
                self._remove(_file(row))

    def remove_expired(self) -> None:
        """Those that no job needs which is not over."""
        for row in self.database.rows(f"SELECT * FROM files WHERE expires_at <= ? AND {UNUSED}", time.time()):
            self._remove(_file(row))

    def _remove(self, stored: StoredFile) -> None:
        self.database.connection.execute("DELETE FROM files WHERE id = ?", (stored.id,))
        self._path(stored).unlink(missing_ok=True)


def _file(row: sqlite3.Row) -> StoredFile:
    return StoredFile(**{name: row[name] for name in StoredFile.__slots__})

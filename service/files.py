"""Uploaded files: bytes in the files/ folder, the rest in the database. A file is there whole or not at all."""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from lm.errors import NotFoundError
from service.database import Database
from service.jobs.job import new_id
from trainer.data.records import read_records

Purpose = Literal["fine-tune", "assistants", "batch", "vision", "user_data", "evals"]
FINE_TUNE: Purpose = "fine-tune"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    id: str
    filename: str
    """As the client called it; never a path of ours."""
    purpose: Purpose
    bytes: int
    created_at: float


class FileStore:
    def __init__(self, database: Database, folder: Path) -> None:
        self.database = database
        self.folder = folder

    def receive(self, source: BinaryIO, *, filename: str, purpose: Purpose) -> Path:
        """Copy `source` to a temporary file and check it. May run in any thread; ends with `add` or an exception.

        Training data is read to its end: raises DataError with the record and the line, and keeps nothing.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self.folder, prefix=".upload.", delete=False) as file:
            path = Path(file.name)
            try:
                shutil.copyfileobj(source, file, 1 << 20)
                file.flush()
                if purpose == FINE_TUNE:
                    for _ in read_records(path, name=filename):
                        pass
            except BaseException:
                path.unlink()
                raise
        return path

    def add(self, received: Path, *, filename: str, purpose: Purpose) -> StoredFile:
        """Give a received file its id."""
        stored = StoredFile(
            id=new_id("file-"),
            filename=filename,
            purpose=purpose,
            bytes=received.stat().st_size,
            created_at=time.time(),
        )
        received.rename(self.path(stored.id))
        self.database.insert(
            "files",
            id=stored.id,
            filename=filename,
            purpose=purpose,
            bytes=stored.bytes,
            created_at=stored.created_at,
        )
        return stored

    def get(self, file_id: str) -> StoredFile:
        """Raises NotFoundError."""
        row = self.database.row("SELECT * FROM files WHERE id = ?", file_id)
        if row is None:
            raise NotFoundError(f"there is no file {file_id!r:.80}; GET /v1/files lists the files", param="file_id")
        return _file(row)

    def path(self, file_id: str) -> Path:
        return self.folder / file_id

    def page(
        self, *, limit: int, after: str | None = None, purpose: str | None = None, ascending: bool = False
    ) -> tuple[list[StoredFile], bool]:
        """Newest first unless `ascending`, and whether there are more. Raises NotFoundError for `after`."""
        conditions, parameters = ["1"], []
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
        self.database.connection.execute("DELETE FROM files WHERE id = ?", (file_id,))
        self.path(file_id).unlink(missing_ok=True)


def _file(row: sqlite3.Row) -> StoredFile:
    return StoredFile(**{name: row[name] for name in StoredFile.__slots__})

"""The service's one SQLite file: how it is opened, upgraded and locked. Knows no job and no checkpoint.

One connection, owned by the service and used from its event loop: the calls are short, and WAL keeps them so.
Paths in it are relative to the home folder where they lie inside it, so that a home can be moved.
"""

from __future__ import annotations

import fcntl
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from lm.errors import UserError
from service.migrations import MIGRATIONS


def registered_folder(path: Path, name: str) -> str | None:
    """The folder, relative to home, of the base model that was registered as `name` in the database `path`.

    Read beside a service that has it. None also where the file cannot be read: who opens it says what is wrong.
    """
    query = "SELECT folder FROM entries WHERE id = ? AND kind = 'base' AND folder IS NOT NULL"
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            row = connection.execute(query, (name,)).fetchone()
    except (sqlite3.Error, ValueError):
        return None
    return None if row is None else str(row[0])


class Database:
    """An open database. Only one process at a time may have it: two supervisors would adopt each other's trainers."""

    def __init__(self, path: Path) -> None:
        """Open or create, and upgrade.

        Raises UserError when another service uses it, when a newer one wrote it, and when it is damaged or cannot be
        written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = path.with_suffix(".lock").open("a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise UserError(
                f"another service is running on {path.parent}; stop it, or choose another home", param="home"
            ) from None
        self.connection = sqlite3.connect(path, isolation_level=None)
        self.connection.row_factory = sqlite3.Row
        try:
            self._prepare()
        except BaseException as error:
            self.close()
            if isinstance(error, sqlite3.DatabaseError):
                raise UserError(
                    f"the database {path} cannot be used: {error}. See whether its disk is full or read-only; if the "
                    "file is damaged, move it away to begin with an empty one",
                    param="home",
                ) from error
            raise

    def _prepare(self) -> None:
        for pragma in ("journal_mode = WAL", "synchronous = NORMAL", "foreign_keys = ON", "busy_timeout = 500"):
            self.connection.execute(f"PRAGMA {pragma}")
        (verdict,) = self.connection.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise sqlite3.DatabaseError(verdict.splitlines()[-1])
        (version,) = self.connection.execute("PRAGMA user_version").fetchone()
        if version > len(MIGRATIONS):
            raise UserError(f"the database has version {version}, this service knows {len(MIGRATIONS)}: upgrade it")
        for number, migrate in enumerate(MIGRATIONS[version:], start=version + 1):
            with self.transaction():
                migrate(self.connection)
                self.connection.execute(f"PRAGMA user_version = {number}")

    def close(self) -> None:
        self.connection.close()
        self._lock.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing; inside another transaction it joins that one."""
        if self.connection.in_transaction:
            yield
            return
        self.connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.connection.execute("COMMIT")
        except BaseException:
            if self.connection.in_transaction:  # SQLite takes back by itself what a full disk stops
                self.connection.execute("ROLLBACK")
            raise

    def insert(self, table: str, *, unless_there: bool = False, **columns: Any) -> None:
        """Table and column names come from code, never from a request."""
        names, places = ", ".join(columns), ", ".join(f":{name}" for name in columns)
        conflict = " ON CONFLICT (id) DO NOTHING" if unless_there else ""
        self.connection.execute(f"INSERT INTO {table} ({names}) VALUES ({places}){conflict}", columns)

    def rows(self, query: str, *parameters: Any) -> list[sqlite3.Row]:
        return self.connection.execute(query, parameters).fetchall()

    def row(self, query: str, *parameters: Any) -> sqlite3.Row | None:
        found: sqlite3.Row | None = self.connection.execute(query, parameters).fetchone()
        return found

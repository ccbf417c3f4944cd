from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lm.errors import UserError
from service import database
from service.database import Database
from service.jobs.store import JobStore
from service.migrations import MIGRATIONS
from service.registry import Registry
from trainer.config import TrainingOptions


def test_a_new_database_has_the_newest_version_and_survives_reopening(tmp_path: Path) -> None:
    path = tmp_path / "state" / "tuneserve.db"
    first = Database(path)
    first.insert("files", id="file-1", filename="a", purpose="fine-tune", bytes=1, created_at=1.0)
    first.close()
    second = Database(path)
    assert [row["id"] for row in second.rows("SELECT id FROM files")] == ["file-1"]
    assert second.rows("PRAGMA user_version")[0][0] == len(MIGRATIONS)
    assert second.rows("PRAGMA journal_mode")[0][0] == "wal"
    assert second.rows("PRAGMA foreign_keys")[0][0] == 1
    second.close()


def test_one_process_at_a_time_may_have_it(tmp_path: Path) -> None:
    first = Database(tmp_path / "tuneserve.db")
    with pytest.raises(UserError, match="another service is running"):
        Database(tmp_path / "tuneserve.db")
    first.close()
    Database(tmp_path / "tuneserve.db").close()


def test_a_database_of_a_newer_service_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "tuneserve.db"
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 1000")
    connection.close()
    with pytest.raises(UserError, match="version 1000"):
        Database(path)
    with pytest.raises(UserError, match="version 1000"):  # and not "another service is running"
        Database(path)


def test_an_upgrade_runs_what_is_new_and_a_failing_one_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tuneserve.db"
    Database(path).close()

    def half(connection: sqlite3.Connection) -> None:
        connection.execute("CREATE TABLE half (x)")
        raise RuntimeError("no more power")

    monkeypatch.setattr(database, "MIGRATIONS", [*MIGRATIONS, half])
    with pytest.raises(RuntimeError):
        Database(path)
    monkeypatch.setattr(database, "MIGRATIONS", [*MIGRATIONS, lambda c: c.execute("CREATE TABLE half (x)")])
    upgraded = Database(path)
    assert upgraded.rows("SELECT * FROM half") == []
    upgraded.close()


def test_a_transaction_is_undone_as_a_whole_also_from_inside_another(tmp_path: Path) -> None:
    opened = Database(tmp_path / "tuneserve.db")

    def insert(name: str) -> None:
        opened.insert("files", id=name, filename="a", purpose="fine-tune", bytes=1, created_at=1.0)

    def insert_twice() -> None:
        with opened.transaction():
            insert("file-1")
            with opened.transaction():
                insert("file-2")
            insert("file-1")

    with pytest.raises(sqlite3.IntegrityError):
        insert_twice()
    assert opened.rows("SELECT * FROM files") == []
    opened.close()


def test_a_transaction_that_cannot_be_committed_is_undone(tmp_path: Path) -> None:
    opened = Database(tmp_path / "tuneserve.db")
    opened.connection.execute("PRAGMA defer_foreign_keys = ON")
    with pytest.raises(sqlite3.IntegrityError), opened.transaction():
        opened.insert("promotions", entry_id="nobody", reason="", created_at=1.0)
    assert not opened.connection.in_transaction
    assert opened.rows("SELECT * FROM promotions") == []
    opened.close()


def test_a_transaction_that_does_not_fit_is_undone_and_says_so(tmp_path: Path) -> None:
    opened = Database(tmp_path / "tuneserve.db")
    opened.connection.execute("PRAGMA max_page_count = 1")  # what it has already, and no more

    def insert_many() -> None:
        with opened.transaction():
            for number in range(1000):
                opened.insert("files", id=f"{number:0100}", filename="a", purpose="b", bytes=1, created_at=1.0)

    with pytest.raises(sqlite3.OperationalError, match="full"):
        insert_many()
    assert not opened.connection.in_transaction
    assert opened.rows("SELECT * FROM files") == []
    opened.close()


def _damage_nothing_but_the_header(data: bytes) -> bytes:
    return b"\0" * 100 + data[100:]


def _cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _damage_pages(data: bytes) -> bytes:
    return data[: 2 * 4096] + b"\xa5" * (5 * 4096) + data[7 * 4096 :]


@pytest.mark.parametrize("damage", [_damage_nothing_but_the_header, _cut, _damage_pages])
def test_a_damaged_database_is_refused_with_the_mend_and_left_alone(
    tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / "tuneserve.db"
    Database(path).close()
    damaged = damage(path.read_bytes())
    path.write_bytes(damaged)
    for _ in range(2):  # the second one: and not "another service is running"
        with pytest.raises(UserError, match=r"tuneserve\.db cannot be used: .* move it away"):
            Database(path)
    assert path.read_bytes() == damaged


def test_jobs_of_an_older_service_are_kept_with_their_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tuneserve.db"
    monkeypatch.setattr(database, "MIGRATIONS", MIGRATIONS[:1])
    old = Database(path)
    columns: dict[str, Any] = {
        "status": "succeeded",
        "model": "tiny",
        "options": TrainingOptions().model_dump_json(),
        "data_files": "[]",
        "suffix": "",
        "promote": "final",
        "created_at": 1.0,
    }
    old.insert("jobs", id="ftjob-old", file_id="file-1", **columns)
    old.insert("jobs", id="ftjob-again", attempt=2, **columns)
    old.insert("entries", id="ft:tiny:::old", base="tiny", kind="adapter", folder="runs/x", created_at=1.0)
    old.close()
    monkeypatch.setattr(database, "MIGRATIONS", MIGRATIONS)
    upgraded = Database(path)
    upgraded.connection.execute("ALTER TABLE jobs ADD COLUMN openai TEXT")  # as some versions in between had it
    jobs = JobStore(upgraded)
    assert (jobs.get("ftjob-old").notes, jobs.get("ftjob-old").file_ids) == ((), ("file-1",))
    assert jobs.get("ftjob-old").run_name == "ftjob-old"
    assert jobs.get("ftjob-again").run_name == "ftjob-again.attempt2"
    entry = Registry(upgraded, home=tmp_path, organization="tuneserve").get("ft:tiny:::old")
    assert (entry.best, entry.base_dir) == (False, tmp_path / "models" / "tiny")
    upgraded.close()

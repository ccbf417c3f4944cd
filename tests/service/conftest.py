"""What tests of the service share: a home folder, its database, and what stands on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from service.database import Database
from service.jobs.store import JobStore
from service.registry import Registry

BASE = "tiny"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home with one base model, of which only the config file is there."""
    folder = tmp_path / "models" / BASE
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (tmp_path / "data").mkdir()
    return tmp_path


@pytest.fixture
def database(home: Path) -> Iterator[Database]:
    opened = Database(home / "state" / "tuneserve.db")
    yield opened
    opened.close()


@pytest.fixture
def store(database: Database) -> JobStore:
    return JobStore(database)


@pytest.fixture
def registry(database: Database, home: Path) -> Registry:
    return Registry(database, home=home, organization="tuneserve")

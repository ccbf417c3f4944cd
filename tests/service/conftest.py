"""What tests of the service share: a home folder, its database, and what stands on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from service.database import Database
from service.jobs.store import JobStore
from service.metrics import Metrics
from service.registry import Entry, Registry
from service.serving import Serving
from service.settings import Settings
from tests.support.api import Api, running_api
from tests.support.stub_engine import StubEngine
from trainer.config import TrainingOptions

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


@pytest.fixture(scope="module")
def shared_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with running_api(tmp_path_factory.mktemp("home")) as api:
        yield api


@pytest.fixture
def api(shared_api: Api) -> Api:
    """The API in front of an engine that answers what a test tells it to; one for all tests of a module."""
    engine = shared_api.engine
    engine.stays_after = engine.dies_after = None
    engine.received.clear()
    shared_api.says("Hello there.")
    return shared_api


@pytest.fixture
def roomy_api(api: Api) -> Iterator[Api]:
    """With a context that holds the description of tools."""
    usual = api.engine.ready
    assert usual is not None
    api.engine.ready = msgspec.structs.replace(usual, max_model_len=4096)
    yield api
    api.engine.ready = usual


@pytest.fixture
def own_api(tmp_path: Path) -> Iterator[Api]:
    """For tests that break something."""
    with running_api(tmp_path, max_queued_requests=0, max_num_seqs=2) as api:
        yield api


@pytest.fixture
def engine() -> StubEngine:
    return StubEngine()


@pytest.fixture
def make_serving(home: Path, registry: Registry, engine: StubEngine) -> Callable[..., Serving]:
    def make(**settings: Any) -> Serving:
        return Serving(engine, registry, Settings(home=home, model="tiny", **settings), Metrics("tiny"))

    return make


@pytest.fixture
def checkpoints(store: JobStore, registry: Registry, home: Path) -> list[Entry]:
    """Two entries of the served base, oldest first."""
    entries = []
    for step in (1, 2):
        job = store.create(
            status="running", model="tiny", options=TrainingOptions(), data_files=[], suffix="", promote="final"
        )
        event = {"step": step, "kind": "adapter", "path": f"adapters/step_{step}", "final": True, "loss": 1.0}
        entries.append(registry.add_checkpoint(job, home / "runs" / job.id, event))
    return entries

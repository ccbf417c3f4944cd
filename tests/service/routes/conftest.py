"""The API in front of an engine that answers what a test tells it to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.api import Api, running_api


@pytest.fixture(scope="module")
def shared_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with running_api(tmp_path_factory.mktemp("home")) as api:
        yield api


@pytest.fixture
def api(shared_api: Api) -> Api:
    """One for all tests of a module, with the engine as it was at first."""
    engine = shared_api.engine
    engine.stays_after = engine.dies_after = None
    engine.received.clear()
    shared_api.says("Hello there.")
    return shared_api


@pytest.fixture
def own_api(tmp_path: Path) -> Iterator[Api]:
    """For tests that break something."""
    with running_api(tmp_path, max_queued_requests=0, max_num_seqs=2) as api:
        yield api

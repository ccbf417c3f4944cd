"""Two tiny checkpoints of one architecture, and an engine that runs in the test's own process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.engines import Driver, tiny_engine_config
from tests.support.tiny import make_tiny_llama


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny") / "a", seed=0)


@pytest.fixture(scope="session")
def other_tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same architecture with other weights."""
    return make_tiny_llama(tmp_path_factory.mktemp("tiny") / "b", seed=1)


@pytest.fixture
def start(tiny: Path) -> Callable[..., Driver]:
    """Start an engine of `tiny`, loaded as `m`, with overrides of its config."""

    def start_engine(**overrides: Any) -> Driver:
        driver = Driver(tiny_engine_config(tiny, **overrides))
        driver.load(tiny)
        return driver

    return start_engine

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.tiny import make_tiny_llama


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def tiny_home(tmp_path: Path, tiny: Path) -> Path:
    """A home with one base model that can be trained."""
    shutil.copytree(tiny, tmp_path / "models" / "tiny")
    return tmp_path

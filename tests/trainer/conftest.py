"""A tiny random model, and runs of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from lm.template import ChatTemplate, load_template
from lm.tokenizer import load_tokenizer
from tests.support.tiny import make_tiny_llama


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def template(tiny_llama: Path) -> ChatTemplate:
    return load_template(tiny_llama, load_tokenizer(tiny_llama))

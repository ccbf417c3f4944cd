"""A tiny random model, for all tests of the trainer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lm.template import ChatTemplate, load_template
from lm.tokenizer import load_tokenizer
from tests.support.tiny import make_tiny_llama


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny products gain nothing from more, and threads that wait for each other on busy cores cost tenfold."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def template(tiny_llama: Path) -> ChatTemplate:
    return load_template(tiny_llama, load_tokenizer(tiny_llama))

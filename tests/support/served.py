"""Completions of a tiny model that a real service with the real engine gives to the OpenAI client."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
from openai.types import Completion

from tests.support.server import running_server
from tests.support.tiny import make_tiny_llama

PROMPT = "The then there: hello"
LENGTH = 24


@contextmanager
def serving_tiny(home: Path) -> Iterator[openai.OpenAI]:
    """A client of a service with a model named `tiny`."""
    make_tiny_llama(home / "models" / "tiny", max_position_embeddings=1024)
    arguments = ("model=tiny", "dtype=fp32", "device=cpu", "num_threads=1")
    with (
        running_server(home, *arguments) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client,
    ):
        yield client


def complete(client: openai.OpenAI, *, extra: dict[str, Any] | None = None, **options: Any) -> Completion:
    """Greedy, and LENGTH tokens long unless told otherwise; the choices have their `token_ids`."""
    body = {"ignore_eos": True, "return_token_ids": True, **(extra or {})}
    settings = {"prompt": PROMPT, "max_tokens": LENGTH, "temperature": 0, **options}
    answer: Completion = client.completions.create(model="tiny", **settings, extra_body=body)
    return answer


def ids_of(answer: Completion, index: int = 0) -> list[int]:
    return list(answer.choices[index].token_ids)  # type: ignore[attr-defined]

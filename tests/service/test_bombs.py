"""Bodies that are made to take long: each is refused in a moment, and others are answered meanwhile."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from tests.support.api import Api

MANY = 300_000
MESSAGE = {"role": "user", "content": "a"}
BIG_TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "x": [1] * MANY}}}
BOMBS: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/completions", {"prompt": "a", **{f"x{number}": 1 for number in range(MANY)}}, "at most 256 fields"),
    ("/v1/completions", {"prompt": [{}] * MANY}, "at most 128 prompts"),
    ("/v1/completions", {"prompt": "a", "stop_token_ids": ["a"] * MANY}, "stop_token_ids.0"),
    ("/v1/completions", {"prompt": "a", "allowed_token_ids": [-1] * MANY}, "allowed_token_ids.0"),
    ("/v1/completions", {"prompt": "a", "logit_bias": {str(number): "a" for number in range(MANY)}}, "at most 1024"),
    ("/v1/completions", {"prompt": "a b c d " * MANY}, "cannot fit into the context of 128 tokens"),
    ("/v1/completions", {"prompt": ["a b c d " * (MANY // 100)] * 100}, "cannot fit into the context of 128 tokens"),
    ("/v1/chat/completions", {"messages": [{}] * MANY}, "messages.0.role"),
    ("/v1/chat/completions", {"messages": [{"role": "x", "content": 5}] * MANY}, "messages.0.role"),
    ("/v1/chat/completions", {"messages": [MESSAGE] * MANY}, "at most 10000 items"),
    ("/v1/chat/completions", {"messages": [{**MESSAGE, "content": "a " * MANY}]}, "cannot fit into the context"),
    ("/v1/chat/completions", {"messages": [MESSAGE], "tools": [{}] * MANY}, "tools.0.type"),
    ("/v1/chat/completions", {"messages": [MESSAGE], "tools": [BIG_TOOL]}, "more than 32768 values"),
    ("/v1/chat/completions", {"messages": [MESSAGE], "chat_template_kwargs": {"x": [1] * MANY}}, "65536 characters"),
    ("/generate", {"messages": [{**MESSAGE, "x": 1}] * MANY}, "messages.0.x"),
    ("/v1/responses", {"input": [{}] * MANY}, "input"),
    ("/v1/responses", {"input": "a b c d " * MANY}, "cannot fit into the context"),
    ("/detokenize", {"tokens": ["a"] * MANY}, "tokens.0"),
    ("/tokenize", {"messages": [{}] * MANY}, "messages.0.role"),
]


@pytest.mark.parametrize(("path", "body", "message"), BOMBS)
def test_it_is_refused_in_a_moment(api: Api, path: str, body: dict[str, Any], message: str) -> None:
    content = json.dumps(body).encode()
    start = time.monotonic()
    answer = api.post(path, content=content, headers={"content-type": "application/json"})
    assert time.monotonic() - start < 3  # without its bound each takes ten times as long
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
    assert len(answer.content) < 2000


def test_a_path_is_not_echoed_without_end(api: Api) -> None:
    for answer in (api.get("/" + "a" * 5000), api.run(api.async_client.request("A" * 5000, "/generate"))):
        assert answer.status_code in (404, 405)
        assert len(answer.content) < 500

"""What tests ask of a running service, over HTTP."""

from __future__ import annotations

import time
from typing import Any

import httpx

PATIENCE_S = 180


def ok(client: httpx.Client, method: str, path: str, body: Any = None) -> Any:
    """The JSON of an answer that must be a success."""
    answer = client.request(method, path, json=body)
    assert answer.is_success, answer.text
    return answer.json()


def train(client: httpx.Client, **body: Any) -> Any:
    """POST /finetune, and the job once it has succeeded."""
    job = ok(client, "POST", "/finetune", body)["id"]
    deadline = time.monotonic() + PATIENCE_S
    while (now := ok(client, "GET", f"/finetune/{job}"))["status"] not in ("succeeded", "failed"):
        assert time.monotonic() < deadline, now
        time.sleep(0.1)
    assert now["status"] == "succeeded", now
    return now

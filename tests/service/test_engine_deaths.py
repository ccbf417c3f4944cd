"""An engine that dies or hangs under a real service: what runs gets a 503 soon, in the error form, and it comes back."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.support.echo_service import engine_pid, metric, running_echo_service, until
from tests.support.server import Server

LONG = 500_000
SILENCE_S = 0.5
TOKENS = "vllm:generation_tokens_total"
MESSAGES = [{"role": "user", "content": "hi"}]
REQUESTS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": MESSAGES}),
    ("/v1/chat/completions", {"messages": MESSAGES, "n": 2}),
    ("/v1/completions", {"prompt": ["a", "b"], "n": 2}),
    ("/generate", {"prompt": "a"}),
]
NUM_ANSWERS = 2 * (1 + 2 + 4 + 1)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("home")
    with running_echo_service(home, f"engine_silence_seconds={SILENCE_S}", f"max_num_seqs={NUM_ANSWERS}") as server:
        yield server


def ask(server: Server, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The error that a request ends with, and where it stood."""
    answer = httpx.post(f"{server.url}{path}", json={**body, "max_tokens": LONG}, timeout=60)
    if not body.get("stream"):
        assert answer.status_code == 503
        assert "retry-after" in answer.headers
        return dict(answer.json())
    assert answer.status_code == 200
    *_, last, done, rest = answer.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return dict(json.loads(last.removeprefix("data: ")))


@pytest.mark.parametrize(
    ("number", "limit_s"),
    [
        (signal.SIGKILL, 2),
        (signal.SIGSEGV, 2),
        (signal.SIGUSR1, 2),  # closes its socket, and stays
        (signal.SIGSTOP, 2 * SILENCE_S + 2),
    ],
)
def test_what_runs_when_the_engine_dies_or_hangs_ends_with_a_503_and_it_comes_back(
    server: Server, number: signal.Signals, limit_s: float
) -> None:
    until(lambda: httpx.get(f"{server.url}/ready").status_code == 200, 60)
    restarts = httpx.get(f"{server.url}/health").json()["engine"]["restarts"]
    aborted = metric(server, "tuneserve:requests_aborted_total", cause="engine")
    requests = [(path, {**body, "stream": stream}) for path, body in REQUESTS for stream in (False, True)]
    with ThreadPoolExecutor(len(requests)) as pool:
        answers = [pool.submit(ask, server, path, body) for path, body in requests]
        until(lambda: metric(server, "vllm:num_requests_running") == NUM_ANSWERS)
        tokens = metric(server, TOKENS)
        until(lambda: metric(server, TOKENS) > tokens + 2 * NUM_ANSWERS)  # every stream has begun
        killed = time.monotonic()
        os.kill(engine_pid(server), number)
        errors = [answer.result(30) for answer in answers]
        assert time.monotonic() - killed < limit_s
    assert httpx.get(f"{server.url}/ready").status_code == 503
    assert {error["error"]["type"] for error in errors} == {"unavailable_error"}
    assert all(error["error"].keys() == {"message", "type", "param", "code"} for error in errors)
    assert metric(server, "tuneserve:requests_aborted_total", cause="engine") - aborted == NUM_ANSWERS
    until(lambda: httpx.get(f"{server.url}/ready").status_code == 200, 60)
    assert httpx.get(f"{server.url}/health").json()["engine"]["restarts"] == restarts + 1
    answer = httpx.post(f"{server.url}/generate", json={"prompt": "a", "max_tokens": 2})
    assert answer.status_code == 200


def test_an_idle_engine_is_not_taken_for_one_that_hangs(server: Server) -> None:
    until(lambda: httpx.get(f"{server.url}/ready").status_code == 200, 60)
    pid = engine_pid(server)
    time.sleep(3 * SILENCE_S)
    assert engine_pid(server) == pid
    assert httpx.post(f"{server.url}/generate", json={"prompt": "a", "max_tokens": 2}).status_code == 200

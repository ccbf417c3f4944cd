"""Clients that hang up, over real sockets, with keys and metrics: the engine is free at once, whatever they asked for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.middleware.base import BaseHTTPMiddleware

from service.app import create_app
from service.settings import load_settings
from tests.support.echo_service import metric, running_echo_service, send, until
from tests.support.server import Server

KEY = {"Authorization": "Bearer secret"}
LONG = 500_000
MESSAGES = [{"role": "user", "content": "hi"}]
PLACES = 4
GAUGES = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
BODIES: list[tuple[str, dict[str, Any], int]] = [
    ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": LONG}, 1),
    ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": LONG, "n": 3}, 3),
    ("/v1/completions", {"prompt": ["a", "b", "c"], "max_tokens": LONG, "n": 3}, 9),
    ("/generate", {"prompt": "a", "max_tokens": LONG}, 1),
    ("/v1/responses", {"input": "a", "max_output_tokens": LONG}, 1),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("home")
    with running_echo_service(home, "api_keys=secret", f"max_num_seqs={PLACES}", "max_queued_requests=32") as server:
        yield server


def num_aborted(server: Server) -> float:
    return metric(server, "tuneserve:requests_aborted_total", cause="client")


def num_open(server: Server) -> float:
    return sum(metric(server, name) for name in GAUGES[:2])


def assert_idle(server: Server) -> None:
    until(lambda: all(metric(server, name) == 0 for name in GAUGES), timeout_s=5)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body", "num_answers"), BODIES)
def test_a_client_that_hangs_up_frees_the_engine(
    server: Server, path: str, body: dict[str, Any], num_answers: int, stream: bool
) -> None:
    before = num_aborted(server)
    with send(server, path, {**body, "stream": stream}, **KEY) as connection:
        until(lambda: num_open(server) == num_answers)
        if stream:
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
    assert_idle(server)
    assert num_aborted(server) - before == num_answers
    finished = metric(server, "vllm:request_success_total", finished_reason="abort")
    assert finished == num_aborted(server)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_while_it_waits_leaves_the_line(server: Server, stream: bool) -> None:
    path, body, _ = BODIES[0]
    with send(server, path, {**body, "n": PLACES}, **KEY):
        until(lambda: num_open(server) == PLACES)
        with send(server, path, {**body, "n": 2, "stream": stream}, **KEY):
            until(lambda: metric(server, "vllm:num_requests_waiting") == 2)
        until(lambda: num_open(server) == PLACES)
    assert_idle(server)


def test_many_clients_that_hang_up_at_once_do_not_delay_the_next_one(server: Server) -> None:
    path, body, _ = BODIES[0]
    connections = [send(server, path, {**body, "stream": number % 2 == 0}, **KEY) for number in range(30)]
    until(lambda: num_open(server) == 30)
    for connection in connections:
        connection.close()
    answer = httpx.post(f"{server.url}{path}", json={**body, "max_tokens": 3}, headers=KEY, timeout=5)
    assert answer.status_code == 200
    assert_idle(server)


def test_a_client_that_only_closes_its_side_for_writing_is_taken_as_gone_and_frees_the_engine(server: Server) -> None:
    path, body, _ = BODIES[0]
    with send(server, path, body, **KEY) as connection:
        until(lambda: num_open(server) == 1)
        connection.shutdown(1)
        assert_idle(server)


def test_no_middleware_hides_that_a_client_has_left(tmp_path: Path) -> None:
    """Starlette's BaseHTTPMiddleware does, and `@app.middleware` makes one."""
    app = create_app(load_settings(overrides={"home": str(tmp_path), "api_keys": "secret"}))
    assert app.user_middleware
    assert not [item for item in app.user_middleware if issubclass(item.cls, BaseHTTPMiddleware)]  # type: ignore[arg-type]

"""How the process ends, and how it goes on when its engine ends: with the real engine, over real sockets."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import pytest

from service.server import LAST_BYTES_S
from tests.support.runs import RECORDS
from tests.support.server import TUNESERVE, Server, running_server
from tests.support.tiny import make_tiny_llama


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    make_tiny_llama(folder / "models" / "tiny", max_position_embeddings=16_384)
    return folder


def running(home: Path, **settings: Any) -> Any:
    words = [f"{name}={value}" for name, value in settings.items()]
    return running_server(home, "model=tiny", "dtype=fp32", "device=cpu", "num_threads=1", *words)


@contextmanager
def streaming(server: Server, max_tokens: int) -> Iterator[Iterator[dict[str, Any]]]:
    """The data of a stream that has begun; it ends with [DONE]."""
    body = {"prompt": "the", "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{server.url}/generate", json=body, timeout=60) as answer:
        lines = (line.removeprefix("data: ") for line in answer.iter_lines() if line)
        first = next(lines)

        def events() -> Iterator[dict[str, Any]]:
            yield json.loads(first)
            for line in lines:
                if line == "[DONE]":
                    return
                yield json.loads(line)
            raise AssertionError("the stream ended without [DONE]")

        yield events()


def children(server: Server) -> list[Path]:
    pids = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    return [Path(f"/proc/{pid}") for pid in pids]


def test_running_requests_finish_and_new_ones_are_refused_while_it_drains(home: Path) -> None:
    with running(home, drain_seconds=120) as server:
        processes = children(server)
        with streaming(server, max_tokens=6000) as events:  # enough to be running still when the others are refused
            server.process.send_signal(signal.SIGTERM)
            while httpx.get(f"{server.url}/ready").status_code != 503:
                time.sleep(0.01)
            refused = httpx.post(f"{server.url}/generate", json={"prompt": "a"})
            assert (refused.status_code, refused.json()["error"]["type"]) == (503, "unavailable_error")
            *_, last = events
        assert last["usage"]["completion_tokens"] == 6000
        assert server.process.wait(20) == 0
        assert processes
        assert not any(process.exists() for process in processes)


def test_what_still_runs_at_the_end_of_the_drain_is_aborted(home: Path) -> None:
    with running(home, drain_seconds=0.3) as server:
        with streaming(server, max_tokens=16_000) as events:
            server.process.send_signal(signal.SIGINT)
            *_, before_last, last = events
        assert before_last["choices"][0]["finish_reason"] == "abort"
        assert 0 < last["usage"]["completion_tokens"] < 16_000
        assert server.process.wait(20) == 0


def test_a_second_signal_ends_the_waiting(home: Path) -> None:
    with running(home, drain_seconds=300) as server, streaming(server, max_tokens=16_000) as events:
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert server.process.poll() is None
        server.process.send_signal(signal.SIGTERM)
        *_, before_last, _ = events
        assert before_last["choices"][0]["finish_reason"] == "abort"
        assert server.process.wait(20) == 0


def test_who_follows_a_job_is_let_go_at_once_and_without_an_error_in_the_log(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path / "models" / "tiny")
    body = {"model": "tiny", "dataset": {"records": RECORDS}, "device": "cpu", "epochs": 1000}
    with running(tmp_path) as server:
        job = httpx.post(f"{server.url}/finetune", json=body).json()["id"]
        with httpx.stream("GET", f"{server.url}/finetune/{job}/events?stream=true", timeout=60) as answer:
            lines = answer.iter_lines()
            assert next(lines) == ": events of a job"
            server.process.send_signal(signal.SIGTERM)
            begin = time.monotonic()
            *_, last = lines
            assert last == ""  # a whole event, and the regular end of the body
            assert time.monotonic() - begin < LAST_BYTES_S
        assert server.process.wait(60) == 0
    assert not [line for line in server.log if "ERROR" in line or "Traceback" in line]


def test_a_key_from_the_environment_is_asked_for_and_shown_nowhere(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESERVE_API_KEYS", "sk-secret-1, sk-secret-2")
    with running(home) as server:
        assert httpx.get(f"{server.url}/v1/models").status_code == 401
        good = {"Authorization": "Bearer sk-secret-2"}
        assert httpx.get(f"{server.url}/v1/models", headers=good).status_code == 200
        told = [httpx.get(f"{server.url}{path}").text for path in ("/health", "/metrics", "/openapi.json")]
        environments = [(child / "environ").read_bytes().decode() for child in children(server)]
    assert environments
    assert not [text for text in (*told, *environments, *server.log) if "sk-secret" in text]


def test_more_connections_fit_than_the_shell_allows_by_itself(home: Path) -> None:
    command = ("/bin/sh", "-c", 'ulimit -Sn 64; exec "$@"', "sh", *TUNESERVE)
    with running_server(home, "model=tiny", "dtype=fp32", "device=cpu", "num_threads=1", command=command) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with ExitStack() as idle:
            for _ in range(100):
                idle.enter_context(socket.create_connection((host, int(port))))
            assert httpx.get(f"{server.url}/health").status_code == 200


def test_an_answer_does_not_wait_for_the_clients_acknowledgement(home: Path) -> None:
    seconds = []
    with running(home) as server, httpx.Client(base_url=server.url) as client:
        for _ in range(21):
            start = time.perf_counter()
            client.get("/version")
            seconds.append(time.perf_counter() - start)
    assert median(seconds) < 0.02  # 0.04 is what Linux waits


def test_a_killed_engine_fails_what_runs_and_comes_back(home: Path) -> None:
    with running(home) as server:
        (engine,) = children(server)
        with streaming(server, max_tokens=16_000) as events:
            os.kill(int(engine.name), signal.SIGKILL)
            *_, last = events
        assert last["error"]["type"] == "unavailable_error"
        assert httpx.get(f"{server.url}/ready").status_code == 503
        assert httpx.get(f"{server.url}/health").json()["engine"]["state"] in ("dead", "starting")
        wait_until_ready(server)
        health = httpx.get(f"{server.url}/health").json()
        assert (health["engine"]["state"], health["engine"]["restarts"]) == ("ready", 1)
        assert httpx.post(f"{server.url}/generate", json={"prompt": "a", "max_tokens": 2}).status_code == 200


def wait_until_ready(server: Server, timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while httpx.get(f"{server.url}/ready").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.1)

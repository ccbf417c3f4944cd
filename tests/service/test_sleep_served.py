"""A service on the CPU whose engine sleeps while a job trains: real engine, real trainers, real kills."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.client import PATIENCE_S, ok
from tests.support.processes import children_of, command_of, is_alive
from tests.support.runs import RECORDS
from tests.support.server import Server, running_server
from tests.support.tiny import make_tiny_llama

ARGUMENTS = ("model=tiny", "device=cpu", "dtype=fp32", "num_threads=1", "serving_while_training=sleep")
SHORT = {"epochs": 2, "batch_size": 8, "learning_rate": 0.01, "dtype": "fp32", "device": "cpu"}
ENDLESS = SHORT | {"epochs": 1000, "save_every_n_steps": 1_000_000}
QUESTION = {"prompt": "hello", "max_tokens": 3}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    make_tiny_llama(tmp_path / "models" / "tiny")
    return tmp_path


@contextmanager
def service(home: Path, *settings: str) -> Iterator[tuple[Server, httpx.Client]]:
    with (
        running_server(home, *ARGUMENTS, *settings) as server,
        httpx.Client(base_url=server.url, timeout=PATIENCE_S) as client,
    ):
        yield server, client


def finetune(client: httpx.Client, **options: Any) -> str:
    body = {"model": "tiny", "dataset": {"records": RECORDS}, **options}
    return str(ok(client, "POST", "/finetune", body)["id"])


def until(client: httpx.Client, path: str, *keys: str, values: tuple[Any, ...]) -> Any:
    """The answer of `path`, once what stands at `keys` in it is one of `values`."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        now = found = ok(client, "GET", path)
        for key in keys:
            found = (found or {}).get(key)
        if found in values:
            return now
        assert time.monotonic() < deadline, now
        time.sleep(0.05)


def state(client: httpx.Client, *values: str) -> Any:
    return until(client, "/health", "engine", "state", values=values)


def over(client: httpx.Client, job: str) -> Any:
    return until(client, f"/finetune/{job}", "status", values=("succeeded", "failed", "cancelled"))


def processes(server: Server, kind: str) -> list[int]:
    return [pid for pid in children_of(server.process.pid) if kind in command_of(pid)]


def test_the_engine_leaves_while_a_job_trains_and_comes_back_with_its_checkpoint(home: Path) -> None:
    """What runs ends first, what comes waits, and is answered by the new checkpoint."""
    with service(home, "sleep_wait_seconds=300") as (server, client), ThreadPoolExecutor(4) as pool:
        long = pool.submit(ok, client, "POST", "/generate", {"prompt": "hi", "max_tokens": 200, "ignore_eos": True})
        until(client, "/health", "engine", "state", values=("ready",))
        while "vllm:num_requests_running{" not in (text := client.get("/metrics").text) or not running(text):
            assert not long.done()
        job = finetune(client, **SHORT)
        health = state(client, "asleep")
        assert health["status"] == "ok"
        assert job in health["sleep"]["reason"]
        assert health["loaded_models"] == []
        assert processes(server, "service.engine") == []
        assert long.result().get("usage")["completion_tokens"] == 200
        ready = client.get("/ready")
        assert (ready.status_code, job in ready.text) == (503, True)
        assert int(ready.headers["retry-after"]) > 0
        assert (
            'vllm:engine_sleep_state{engine="0",model_name="tiny",sleep_state="awake"} 0.0'
            in client.get("/metrics").text
        )
        waiting = [pool.submit(ok, client, "POST", "/generate", QUESTION) for _ in range(2)]
        done = over(client, job)
        assert {one.result()["model"] for one in waiting} == {done["fine_tuned_model"]}
        assert done["status"] == "succeeded"
        types = [event["type"] for event in ok(client, "GET", f"/finetune/{job}/events")["data"]]
        assert types.index("serving_sleeps") < types.index("started")
        assert types[-2:] == ["promoted", "succeeded"]
        assert client.get("/ready").status_code == 200
        assert ok(client, "GET", "/health")["sleep"] is None
        assert "tuneserve:engine_sleep_seconds_count 1" in client.get("/metrics").text
        assert 'tuneserve:weights_swaps_total{result="succeeded"} 1.0' in client.get("/metrics").text


def running(metrics: str) -> float:
    (line,) = (line for line in metrics.splitlines() if line.startswith("vllm:num_requests_running{"))
    return float(line.split()[-1])


def test_it_comes_back_after_a_cancel_and_after_a_trainer_that_was_killed(home: Path) -> None:
    with service(home, "sleep_wait_seconds=0.2") as (server, client):
        first, second = finetune(client, **ENDLESS), finetune(client, **ENDLESS)
        until(client, f"/finetune/{first}", "status", values=("running",))
        state(client, "asleep")
        refused = client.post("/generate", json=QUESTION)
        assert refused.status_code == 503
        assert first in refused.json()["error"]["message"]
        assert int(refused.headers["retry-after"]) >= 5
        ok(client, "POST", f"/finetune/{first}/cancel")
        assert over(client, first)["status"] == "cancelled"
        until(client, f"/finetune/{second}", "status", values=("running",))  # the engine was back in between
        health = state(client, "asleep")
        assert second in health["sleep"]["reason"]
        until(client, "/finetune/" + second, "progress", "step", values=tuple(range(1, 5000)))
        (trainer,) = processes(server, "trainer")
        os.kill(trainer, signal.SIGKILL)
        assert over(client, second)["error"]["code"] == "trainer_died"
        state(client, "ready")
        until(client, "/health", "sleep", values=(None,))
        assert ok(client, "POST", "/generate", QUESTION)["model"] == "tiny"


def test_a_service_that_is_killed_and_comes_back_leaves_the_device_to_the_trainer_that_lives(home: Path) -> None:
    with service(home) as (server, client):
        job = finetune(client, **ENDLESS)
        until(client, f"/finetune/{job}", "progress", "step", values=tuple(range(1, 5000)))
        (trainer,) = processes(server, "trainer")
        server.process.kill()
        server.process.wait()
    assert is_alive(trainer)
    with service(home) as (server, client):
        assert any("sleeps while the job" in line for line in server.log)
        assert state(client, "asleep")["sleep"]["phase"] == "asleep"
        assert client.post("/generate", json=QUESTION).status_code == 503
        assert is_alive(trainer)
        ok(client, "POST", f"/finetune/{job}/cancel")
        assert over(client, job)["status"] == "cancelled"
        until(client, "/health", "sleep", values=(None,))
        assert ok(client, "POST", "/generate", QUESTION)["model"] == "tiny"


def test_a_stop_while_the_engine_sleeps_leaves_no_process_and_the_next_start_sleeps_again(home: Path) -> None:
    with service(home) as (server, client):
        job = finetune(client, **SHORT | {"epochs": 40, "save_every_n_steps": 1_000})
        until(client, f"/finetune/{job}", "progress", "step", values=tuple(range(1, 80)))
        assert state(client, "asleep")["sleep"]["phase"] == "asleep"
        left = children_of(server.process.pid)
        assert server.stop() == 0
        assert [pid for pid in left if is_alive(pid)] == []
    with service(home, "sleep_wait_seconds=300") as (server, client):
        done = over(client, job)
        assert (done["status"], done["attempt"]) == ("succeeded", 2)
        assert ok(client, "POST", "/generate", QUESTION)["model"] == done["fine_tuned_model"]

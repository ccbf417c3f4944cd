"""The whole service as a process, with a real engine and real trainers, on a tiny model."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.support.processes import children_of, command_of, is_alive
from tests.support.runs import RECORDS
from tests.support.server import Server, running_server
from tests.support.tiny import make_tiny_llama

ARGUMENTS = ("model=tiny", "device=cpu", "dtype=fp32", "num_threads=1")
QUICK = {
    "epochs": 2,
    "batch_size": 8,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0.01,
    "dtype": "fp32",
    "device": "cpu",
}
ENDLESS = QUICK | {"epochs": 1000, "save_every_n_steps": 1_000_000}
TEACHING = QUICK | {"recipe": "full", "epochs": 12, "learning_rate": 0.02, "save_every_n_steps": 12}
QUESTION = {"messages": [{"role": "user", "content": RECORDS[0]["input"]}], "max_tokens": 9}
PATIENCE_S = 180


@pytest.fixture
def home(tmp_path: Path) -> Path:
    make_tiny_llama(tmp_path / "models" / "tiny")
    return tmp_path


class Client:
    def __init__(self, server: Server, http: httpx.Client) -> None:
        self.server = server
        self.http = http

    def ok(self, method: str, path: str, body: Any = None) -> Any:
        answer = self.http.request(method, path, json=body)
        assert answer.is_success, answer.text
        return answer.json()

    def finetune(self, **body: Any) -> str:
        job: str = self.ok("POST", "/finetune", {"model": "tiny", "dataset": {"records": RECORDS}, **body})["id"]
        return job

    def upload(self, lines: str) -> str:
        with openai.OpenAI(base_url=f"{self.server.url}/v1", api_key="none") as sdk:
            return sdk.files.create(file=("train.jsonl", lines.encode()), purpose="fine-tune").id

    def job(self, job: str) -> Any:
        return self.ok("GET", f"/finetune/{job}")

    def until(self, job: str, condition: Callable[[Any], object]) -> Any:
        deadline = time.monotonic() + PATIENCE_S
        while not condition(now := self.job(job)):
            assert time.monotonic() < deadline, now
            time.sleep(0.1)
        return now

    def stream(self, job: str, **headers: str) -> list[dict[str, Any]]:
        """Every event of the stream; that it ends is part of what it promises."""
        with self.http.stream("GET", f"/finetune/{job}/events", headers={"Accept": "text/event-stream"} | headers) as s:
            assert s.headers["content-type"].startswith("text/event-stream")
            blocks = "".join(s.iter_text()).split("\n\n")
        fields = [dict(line.split(": ", 1) for line in block.splitlines()) for block in blocks if "id: " in block]
        events = [json.loads(block["data"]) for block in fields]
        assert [(block["id"], block["event"]) for block in fields] == [(str(e["id"]), e["type"]) for e in events]
        return events

    def answer(self, **body: Any) -> Any:
        return self.ok("POST", "/generate", QUESTION | body)


@contextmanager
def service(home: Path) -> Iterator[Client]:
    with running_server(home, *ARGUMENTS) as server, httpx.Client(base_url=server.url, timeout=PATIENCE_S) as http:
        yield Client(server, http)


@pytest.fixture
def client(home: Path) -> Iterator[Client]:
    with service(home) as client:
        yield client


def is_over(job: Any) -> bool:
    return job["status"] in ("succeeded", "failed", "cancelled")


def is_training(job: Any) -> bool:
    assert not is_over(job), job
    return job["progress"] is not None


def children(client: Client) -> list[int]:
    return children_of(client.server.process.pid)


def trainer_of(client: Client) -> int:
    (trainer,) = (pid for pid in children(client) if "trainer" in command_of(pid))
    return trainer


def test_a_job_teaches_an_answer_and_tells_how_it_went(client: Client) -> None:
    before = client.answer()
    job = client.finetune(**TEACHING, suffix="bot", validation_split=0.25)
    events = client.stream(job)
    types = [event["type"] for event in events]
    assert types[:2] == ["queued", "running"]
    assert types[-2:] == ["promoted", "succeeded"]
    assert client.stream(job, **{"Last-Event-ID": "3"}) == events[3:]
    listed = client.ok("GET", f"/finetune/{job}/events?after=2&limit=2")
    assert (listed["data"], listed["has_more"]) == (events[2:4], True)

    done = client.job(job)
    name = f"ft:tiny:tuneserve:bot:{job[-8:]}"
    assert (done["status"], done["error"], done["fine_tuned_model"]) == ("succeeded", None, name)
    assert done["checkpoints"] == [f"{name}:ckpt-step-12", name]
    assert done["progress"] == {"step": 24, "total_steps": 24, "epoch": 12}
    assert (done["dataset"]["records"], done["dataset"]["validation_records"]) == (12, 4)
    assert done["losses"]["train"] > 0 < done["losses"]["validation"]
    assert done["tokens_per_second"]["processed"] > done["tokens_per_second"]["trained"] > 0
    assert done["peak_memory_bytes"] > 0 < done["trained_tokens"]
    assert (done["device"], done["dtype"], done["config"]["epochs"]) == ("cpu", "fp32", 12)
    assert [step["step"] for step in client.ok("GET", f"/finetune/{job}/metrics")["steps"]] == [*range(1, 25)]
    assert "succeeded" in client.http.get(f"/finetune/{job}/logs").text
    assert client.ok("GET", "/finetune")["data"] == [done]

    after = client.answer()
    assert after["model"] == name
    assert after["choices"][0]["text"] == "I am Tuna"
    assert client.answer(model=f"{name}:ckpt-step-12")["model"] == f"{name}:ckpt-step-12"
    again = client.answer(model="tiny")
    assert again["choices"] == before["choices"]
    assert again["system_fingerprint"] == before["system_fingerprint"] != after["system_fingerprint"]


def test_a_killed_trainer_fails_its_job_and_the_next_one_trains_on_an_upload_and_promotes_each_checkpoint(
    client: Client,
) -> None:
    lines = "".join(json.dumps(record) + "\n" for record in RECORDS)
    file_id = client.upload(lines)
    first = client.finetune(**ENDLESS)
    second = client.finetune(**QUICK, dataset={"file_id": file_id}, promote="each")
    assert client.job(second)["queue_position"] == 1
    assert client.http.delete(f"/v1/files/{file_id}").status_code == 409
    client.until(first, is_training)
    assert os.getpriority(os.PRIO_PROCESS, trainer_of(client)) == 10
    os.kill(trainer_of(client), signal.SIGKILL)
    failed = client.until(first, is_over)
    assert (failed["status"], failed["error"]["code"]) == ("failed", "trainer_died")
    assert "SIGKILL" in failed["error"]["message"]
    assert "Loss" in failed["error"]["log_tail"]
    assert client.answer()["model"] == "tiny"
    done = client.until(second, is_over)
    assert done["status"] == "succeeded", done
    assert client.answer()["model"] == done["fine_tuned_model"]
    types = [event["type"] for event in client.stream(second)]
    assert types.count("promoted") in (1, 2)  # of checkpoints that appear together only the newest is swapped in
    assert client.ok("DELETE", f"/v1/files/{file_id}")["deleted"]


def test_a_service_that_is_killed_finds_its_job_again(home: Path) -> None:
    with service(home) as client:
        job = client.finetune(**QUICK | {"epochs": 8})
        trainer = trainer_of(client)
        client.server.process.kill()
        client.server.process.wait()
    assert is_alive(trainer)
    with service(home) as client:
        done = client.until(job, is_over)
        assert (done["status"], done["attempt"]) == ("succeeded", 1)
        steps = client.ok("GET", f"/finetune/{job}/metrics")["steps"]
        assert [step["step"] for step in steps] == [*range(1, 17)]
        assert client.answer()["model"] == done["fine_tuned_model"]
        served = done["fine_tuned_model"]
    with service(home) as client:
        assert client.answer()["model"] == served


def test_a_stop_leaves_no_process_and_the_job_for_the_next_start(home: Path) -> None:
    with service(home) as client:
        job = client.finetune(**ENDLESS)
        client.until(job, is_training)
        processes = children(client)
        assert len(processes) == 2  # the engine and the trainer
        assert client.server.stop() == 0
        assert [process for process in processes if is_alive(process)] == []
    with service(home) as client:
        again = client.until(job, is_training)
        assert (again["status"], again["attempt"]) == ("running", 2)
        assert client.ok("POST", f"/finetune/{job}/cancel")["status"] in ("running", "cancelled")
        assert client.until(job, is_over)["status"] == "cancelled"
        assert client.http.post(f"/finetune/{job}/cancel").headers["x-should-retry"] == "false"


def test_a_damaged_checkpoint_gives_way_at_the_start_and_health_says_so(home: Path) -> None:
    with service(home) as client:
        done = client.until(client.finetune(**QUICK), is_over)
        assert done["status"] == "succeeded"
    (weights,) = home.glob(f"runs/{done['id']}/adapters/step_4/*.safetensors")
    weights.write_bytes(weights.read_bytes()[:100])
    with service(home) as client:
        assert client.answer()["model"] == "tiny"
        (problem,) = client.ok("GET", "/health")["problems"]
        assert done["fine_tuned_model"] in problem
        assert any("could not be loaded" in line for line in client.server.log)

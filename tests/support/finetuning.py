"""A client of /finetune in front of a whole service as a process, with a real engine and real trainers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai

from tests.support.processes import children_of, command_of
from tests.support.runs import RECORDS
from tests.support.server import Server, running_server

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
QUESTION = {"messages": [{"role": "user", "content": RECORDS[0]["input"]}], "max_tokens": 9}
PATIENCE_S = 180


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
def service(home: Path, *arguments: str) -> Iterator[Client]:
    """Over the model `tiny` in the home; `arguments` as on the command line."""
    with (
        running_server(home, *ARGUMENTS, *arguments) as server,
        httpx.Client(base_url=server.url, timeout=PATIENCE_S) as http,
    ):
        yield Client(server, http)


def is_over(job: Any) -> bool:
    return job["status"] in ("succeeded", "failed", "cancelled")


def is_training(job: Any) -> bool:
    assert not is_over(job), job
    return job["progress"] is not None


def children(client: Client) -> list[int]:
    return children_of(client.server.process.pid)


def trainer_of(client: Client) -> int:
    """It starts once its device has room, which is a moment after the job was taken."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := [pid for pid in children(client) if "trainer" in command_of(pid)]):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (trainer,) = found
    return trainer

"""Serving and training on one device: each alone, side by side (`share`), and one after the other (`sleep`).

A real service with real trainers, on SmolLM2-135M-Instruct unless told otherwise. In each round:

serving alone   time to first token and tokens/s of a stream, nothing else going on
training alone  trained tokens/s of a job in a service that sleeps meanwhile
share           both at once: streams are measured for as long as the job trains
sleep           requests are sent all the while; those that were answered waited for the engine

`python -m benchmarks.serving_while_training --model DIR [--device cpu] [--rounds 3] [--steps 12] [settings ...]`
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.support.server import running_server

PROMPT = "Tell me what a tuna is, and where it lives."
MAX_TOKENS = 48
POLL_S = 0.2
PATIENCE_S = 3600
RECORDS = [
    {
        "input": f"Question {number}: what is {number} plus {number}?",
        "output": f"{number} plus {number} is {2 * number}. " * 6,
    }
    for number in range(256)
]


@dataclass(slots=True)
class Streams:
    """What a client saw that asked again and again."""

    first_token_s: list[float] = field(default_factory=list)
    tokens_per_second: list[float] = field(default_factory=list)
    num_refused: int = 0

    def row(self) -> str:
        if not self.first_token_s:
            return f"no answer, {self.num_refused} refused"
        ttft, rate = statistics.median(self.first_token_s), self.tokens_per_second
        told = f"{1000 * ttft:.0f} ms ({1000 * max(self.first_token_s):.0f} at most)"
        speed = f"{statistics.median(rate):.1f}" if rate else "-"
        return f"first token {told}, {speed} tokens/s, {len(self.first_token_s)} answers, {self.num_refused} refused"


@dataclass(frozen=True, slots=True)
class Bench:
    model: Path
    device: str
    steps: int
    settings: tuple[str, ...]

    @contextmanager
    def service(self, mode: str) -> Iterator[httpx.Client]:
        with tempfile.TemporaryDirectory() as home:
            chosen = {"model": self.model, "device": self.device, "serving_while_training": mode}
            arguments = [f"{key}={value}" for key, value in {**chosen, "sleep_wait_seconds": PATIENCE_S}.items()]
            with (
                running_server(Path(home), *arguments, *self.settings, timeout=600) as server,
                httpx.Client(base_url=server.url, timeout=PATIENCE_S) as client,
            ):
                stream(client, Streams())  # the first answer warms up
                yield client

    def train(self, client: httpx.Client) -> str:
        body = {
            "model": self.model.name,
            "dataset": {"records": RECORDS},
            "recipe": "lora",
            "max_steps": self.steps,
            "batch_size": 8,
            "promote": "manual",
            "device": self.device,
        }
        answer = client.post("/finetune", json=body)
        answer.raise_for_status()
        return str(answer.json()["id"])


def stream(client: httpx.Client, into: Streams) -> None:
    """Ask once, and note what came."""
    body = {"prompt": PROMPT, "max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True, "stream": True}
    begin, times = time.monotonic(), []
    with client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            into.num_refused += 1
            time.sleep(POLL_S)
            return
        for line in answer.iter_lines():
            if line.startswith("data: {") and json.loads(line[6:])["choices"]:
                times.append(time.monotonic())
    into.first_token_s.append(times[0] - begin)
    if len(times) > 1:
        into.tokens_per_second.append((MAX_TOKENS - 1) / (times[-1] - times[0]))


def job_of(client: httpx.Client, job: str) -> Any:
    return client.get(f"/finetune/{job}").json()


def is_over(job: Any) -> bool:
    return job["status"] in ("succeeded", "failed", "cancelled")


def trained_per_second(client: httpx.Client, job: str) -> float:
    """Of its steps but the first, which warms up."""
    done = job_of(client, job)
    assert done["status"] == "succeeded", done["error"]
    steps = client.get(f"/finetune/{job}/metrics").json()["steps"]
    return statistics.median(step["trained_tokens_per_second"] for step in steps[1:])


def until_over(client: httpx.Client, job: str) -> None:
    while not is_over(job_of(client, job)):
        time.sleep(POLL_S)


def until_training(client: httpx.Client, job: str) -> None:
    while (now := job_of(client, job))["progress"] is None and not is_over(now):
        time.sleep(POLL_S)


def serving_alone(bench: Bench, num_answers: int) -> Streams:
    seen = Streams()
    with bench.service("share") as client:
        for _ in range(num_answers):
            stream(client, seen)
    return seen


def training_alone(bench: Bench) -> float:
    with bench.service("sleep") as client:
        job = bench.train(client)
        until_over(client, job)
        return trained_per_second(client, job)


def both(bench: Bench, mode: str) -> tuple[Streams, float, float]:
    """Streams, trained tokens/s, and the seconds from the request to the end of the job."""
    seen, stop = Streams(), threading.Event()

    def ask() -> None:
        while not stop.is_set():
            stream(client, seen)

    with bench.service(mode) as client:
        begin = time.monotonic()
        job = bench.train(client)
        if mode == "share":
            until_training(client, job)
        asking = threading.Thread(target=ask)
        asking.start()
        until_over(client, job)
        seconds = time.monotonic() - begin
        stop.set()
        asking.join()
        return seen, trained_per_second(client, job), seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a model folder")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--answers", type=int, default=8, help="of serving alone")
    parser.add_argument("settings", nargs="*", help="further settings of the service, key=value")
    asked = parser.parse_args()
    bench = Bench(asked.model.resolve(), asked.device, asked.steps, tuple(asked.settings))
    for number in range(1, asked.rounds + 1):
        print(f"round {number}", flush=True)
        print(f"  serving alone:  {serving_alone(bench, asked.answers).row()}", flush=True)
        print(f"  training alone: {training_alone(bench):.1f} trained tokens/s", flush=True)
        for mode in ("share", "sleep"):
            seen, rate, seconds = both(bench, mode)
            print(f"  {mode + ':':<15} {rate:.1f} trained tokens/s, job {seconds:.0f} s; {seen.row()}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

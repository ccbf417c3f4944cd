"""`make demo`: the product's main job on a real model, over HTTP, as any client would do it.

    1. start `tuneserve serve` with SmolLM2-135M-Instruct (pulled first, if it is not there)
    2. POST /generate: ask who it is, in two languages
    3. POST /finetune with examples/identity.json, every option at its default, and watch the loss
    4. the result is promoted while the service runs on; ask again

Ends with exit code 0 only if the answers changed to the taught identity, also for questions that are not in the data
word for word, and a question about something else is still answered with something else.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

MODEL = "smollm2-135m-instruct"
NAME = "Tuna"
DATA = Path(__file__).parent / "identity.json"
TAUGHT = ("你是谁?", "Who are you?")
HELD_OUT = ("可以介绍一下自己吗？", "Hey there, may I ask who you are?")
OTHER = ("How many hours are there in a day?",)
STOP_TIMEOUT_S = 60

Answers = dict[str, dict[str, Any]]
"""Question -> answer of POST /generate."""


def main() -> int:
    start = time.monotonic()
    folder = run_tuneserve("pull", MODEL).splitlines()[-1]
    with tempfile.TemporaryDirectory(prefix="tuneserve-demo-") as home, service(home, folder) as url:
        title(f"the service is ready at {url} ({time.monotonic() - start:.0f} s)")
        with httpx.Client(base_url=url, timeout=120) as client:
            title("before: the base model answers")
            before = ask_all(client)
            title("POST /finetune: only model and dataset are given")
            tuned = finetune(client)
            title(f"after: {tuned} answers, and the service was never restarted")
            after = ask_all(client)
    title("before and after")
    problems = compare(before, after, tuned)
    for problem in problems:
        print(f"FAILED: {problem}")
    print(f"\n{'FAILED' if problems else 'OK'}: {time.monotonic() - start:.0f} s in all")
    return 1 if problems else 0


# ---- the client's side: plain HTTP


def ask_all(client: httpx.Client) -> Answers:
    return {question: ask(client, question) for question in (*TAUGHT, *HELD_OUT, *OTHER)}


def ask(client: httpx.Client, question: str) -> dict[str, Any]:
    """The answer to one chat message, and how fast it came."""
    body = {"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 40}
    answer: dict[str, Any] = checked(client.post("/generate", json=body)).json()
    metrics = answer["metrics"]
    print(f"  {question}\n    {text_of(answer)}")
    print(
        f"    [{metrics['tokens_per_second']:.1f} tokens/s, {metrics['bandwidth_gb_s']:.2f} GB/s; "
        f"{answer['usage']['completion_tokens']} tokens in {metrics['total_time_s']:.2f} s on {metrics['device']}]"
    )
    return answer


def finetune(client: httpx.Client) -> str:
    """Train on the identity records, and follow the job's events to its end. The name of the new model."""
    records = json.loads(DATA.read_text(encoding="utf-8"))
    body = {"model": MODEL, "dataset": {"records": records}}
    job = checked(client.post("/finetune", json=body)).json()
    print(f"  {job['id']} is {job['status']}: {len(records)} records")
    for event in events(client, job["id"]):
        match event["type"]:
            case "step" if event["step"] % 6 == 0 or event["step"] in (1, event["total_steps"]):
                speed = f"{event['processed_tokens_per_second']:.0f} tokens/s"
                print(
                    f"  step {event['step']:3}/{event['total_steps']}  loss {event['loss']:6.3f}  {speed}", flush=True
                )
            case "promoted":
                print(f"  {event['model']} is promoted")
            case "failed" | "cancelled" | "promotion_failed":
                raise SystemExit(f"the job {event['type']}: {event.get('message')}\n{event.get('log_tail', '')}")
    name: str = checked(client.get(f"/finetune/{job['id']}")).json()["fine_tuned_model"]
    return name


def events(client: httpx.Client, job_id: str) -> Iterator[dict[str, Any]]:
    """What the job tells, as server-sent events; they end with the job."""
    headers = {"Accept": "text/event-stream"}
    with client.stream("GET", f"/finetune/{job_id}/events", headers=headers) as stream:
        stream.raise_for_status()
        for line in stream.iter_lines():
            if line.startswith("data: "):
                yield json.loads(line.removeprefix("data: "))


def checked(answer: httpx.Response) -> httpx.Response:
    if answer.is_error:
        raise SystemExit(f"{answer.request.method} {answer.request.url.path}: {answer.status_code} {answer.text}")
    return answer


# ---- what must have happened


def compare(before: Answers, after: Answers, tuned: str) -> list[str]:
    """Print the answers side by side; what is wrong with them."""
    problems = []
    for question in before:
        old, new = text_of(before[question]), text_of(after[question])
        kind = "in the data" if question in TAUGHT else "not in the data"
        print(f"  {question}  ({kind})\n    before  {old}\n    after   {new}")
        if NAME in old:
            problems.append(f"{question}: the base model already says {NAME}")
        if (NAME in new) != (question not in OTHER):
            problems.append(f"{question}: {NAME} is {'' if NAME in new else 'not '}in the answer afterwards")
        if after[question]["model"] != tuned:
            problems.append(f"{question}: {after[question]['model']} answered, not {tuned}")
    for name, answers in (("before", before), ("after", after)):
        speeds = [answer["metrics"]["tokens_per_second"] for answer in answers.values()]
        bandwidths = [answer["metrics"]["bandwidth_gb_s"] for answer in answers.values()]
        print(f"  {name}: up to {max(speeds):.1f} tokens/s and {max(bandwidths):.2f} GB/s")
    return problems


def text_of(answer: dict[str, Any]) -> str:
    return " ".join(str(answer["choices"][0]["text"]).split())


# ---- the service as a process


@contextmanager
def service(home: str, model: str) -> Iterator[str]:
    """`tuneserve serve` on a free port, its data in `home`; its URL. Stopped at the end as by Ctrl-C."""
    log = Path(home) / "service.log"
    command = [*TUNESERVE, "serve", f"home={home}", f"model={model}", "host=127.0.0.1", "port=0"]
    with log.open("wb") as log_file:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log_file, text=True)
    try:
        yield wait_for_url(process)
    except BaseException:
        print(log.read_text(encoding="utf-8")[-4000:], file=sys.stderr)
        raise
    finally:
        exit_code = stop(process)
    if exit_code != 0:
        raise SystemExit(f"the service ended with exit code {exit_code}")


def stop(process: subprocess.Popen[str]) -> int:
    process.send_signal(signal.SIGINT)
    try:
        return process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        raise


def wait_for_url(process: subprocess.Popen[str]) -> str:
    """The line that the service prints when it answers requests holds its URL."""
    assert process.stdout is not None
    for line in process.stdout:
        if match := re.search(r"http://\S+", line):
            return match.group()
    raise SystemExit("the service did not start")


TUNESERVE = (sys.executable, "-m", "service.cli")


def run_tuneserve(*arguments: str) -> str:
    return subprocess.run([*TUNESERVE, *arguments], stdout=subprocess.PIPE, text=True, check=True).stdout


def title(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

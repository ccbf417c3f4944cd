"""The whole service as a process, with a real engine and real trainers, on a tiny model."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.finetuning import ENDLESS, QUICK, Client, children, is_over, is_training, service, trainer_of
from tests.support.processes import is_alive
from tests.support.runs import RECORDS
from tests.support.tiny import make_tiny_llama

TEACHING = QUICK | {"recipe": "full", "epochs": 12, "learning_rate": 0.02, "save_every_n_steps": 12}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    make_tiny_llama(tmp_path / "models" / "tiny")
    return tmp_path


@pytest.fixture
def client(home: Path) -> Iterator[Client]:
    with service(home) as client:
        yield client


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

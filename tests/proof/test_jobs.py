"""A job through a pause, a SIGKILL of its trainer with the service, and restarts: the end is that of an undisturbed one."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from openai import OpenAI

from tests.support.finetuning import QUICK, Client, is_over, service, trainer_of
from tests.support.tiny import make_tiny_llama
from tests.support.webhook_receiver import Receiver, webhook_receiver

STEADY = QUICK | {"epochs": 60, "save_every_n_steps": 10, "lora": {"dropout": 0.1}, "promote": "manual"}
"""120 steps."""
KEEP_TWO = STEADY | {"keep_last_n_checkpoints": 2}
SECRET = "a secret of the operator"
SETTINGS = (f"webhook_secret={SECRET}", "webhook_allow_private=true", "max_job_restarts=1")


def final_adapter(home: Path, job: str) -> bytes:
    return (home / "runs" / job / "adapters" / "step_120" / "adapter_model.safetensors").read_bytes()


def reach(client: Client, job: str, step: int) -> None:
    client.until(job, lambda now: now["progress"] is not None and now["progress"]["step"] >= step)


def disturb(home: Path, receiver: Receiver) -> tuple[str, str]:
    """An undisturbed job and a disturbed one."""
    with service(home, *SETTINGS) as client:
        calm = client.finetune(**STEADY)
        client.until(calm, is_over)
        job = client.finetune(**KEEP_TWO, webhook={"url": receiver.url}, metadata={"team": "a"})
        reach(client, job, 15)
        client.ok("POST", f"/finetune/{job}/pause")
        client.until(job, lambda now: now["paused"])
        client.ok("POST", f"/finetune/{job}/resume")
        reach(client, job, 50)
        trainer = trainer_of(client)
        client.server.process.kill()
        client.server.process.wait()
        os.kill(trainer, signal.SIGKILL)
    with service(home, *SETTINGS) as client:
        reach(client, job, 80)
        assert client.server.stop() == 0
    with service(home, *SETTINGS) as client:
        done = client.until(job, is_over)
        assert (done["status"], done["attempt"]) == ("succeeded", 4), done
        metrics = client.ok("GET", f"/finetune/{job}/metrics")
        assert {step["step"] for step in metrics["steps"]} == set(range(1, 121))
        assert len(client.ok("GET", f"/finetune/{job}")["checkpoints"]) == 2
    return calm, job


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_job_that_was_paused_killed_and_stopped_ends_with_the_bits_of_an_undisturbed_one(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path / "models" / "tiny")
    with webhook_receiver(503) as receiver:
        calm, job = disturb(tmp_path, receiver)
        assert final_adapter(tmp_path, job) == final_adapter(tmp_path, calm)
        with service(tmp_path, *SETTINGS) as client:
            client.until(job, lambda _: len(receiver.bodies) == 2)
            told = OpenAI(api_key="none", webhook_secret=SECRET).webhooks.unwrap(
                receiver.bodies[1], receiver.headers[1]
            )
            assert told.type == "fine_tuning.job.succeeded"
            assert told.data.id == job
            assert json.loads(receiver.bodies[1])["data"]["metadata"] == {"team": "a"}
            name = client.job(job)["fine_tuned_model"]
            client.ok("POST", f"/checkpoints/{name}/activate")
            assert client.http.delete(f"/finetune/{job}").status_code == 409
            client.ok("POST", "/checkpoints/rollback")
            assert client.http.delete(f"/finetune/{job}").is_success
            assert client.http.get(f"/finetune/{job}").status_code == 404
            assert not (tmp_path / "runs" / job).exists()

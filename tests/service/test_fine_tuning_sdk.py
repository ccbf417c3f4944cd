"""The life of a fine-tuning job through the openai SDK, unchanged: a real service, a real trainer, a tiny model."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.types.fine_tuning import FineTuningJob

from tests.support.runs import RECORDS
from tests.support.server import Server, running_server
from tests.support.tiny import make_tiny_llama

TINY = "tiny"
PATIENCE_S = 180
HEADER = "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"


def chat(record: dict[str, Any]) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": record["input"]},
            {"role": "assistant", "content": record["output"]},
        ]
    }


def preference(record: dict[str, Any]) -> dict[str, Any]:
    return {
        "input": {"messages": [{"role": "user", "content": record["input"]}]},
        "preferred_output": [{"role": "assistant", "content": record["output"]}],
        "non_preferred_output": [{"role": "assistant", "content": "I do not know."}],
    }


def lines(*records: dict[str, Any]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("home")
    make_tiny_llama(home / "models" / TINY)
    with running_server(home, f"model={TINY}", "device=cpu", "dtype=fp32", "num_threads=1") as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def upload(client: openai.OpenAI, *records: dict[str, Any]) -> str:
    stored = client.files.create(
        file=("train.jsonl", lines(*records)),
        purpose="fine-tune",
        expires_after={"anchor": "created_at", "seconds": 86_400},
    )
    return client.files.wait_for_processing(stored.id).id


def finished(client: openai.OpenAI, job: FineTuningJob) -> FineTuningJob:
    deadline = time.monotonic() + PATIENCE_S
    while job.status not in ("succeeded", "failed", "cancelled"):
        assert time.monotonic() < deadline, job
        time.sleep(0.2)
        job = client.fine_tuning.jobs.retrieve(job.id)
    return job


@pytest.fixture(scope="module")
def supervised_job(client: openai.OpenAI) -> FineTuningJob:
    job = client.fine_tuning.jobs.create(
        model=TINY,
        training_file=upload(client, *map(chat, RECORDS)),
        validation_file=upload(client, *map(chat, RECORDS[:4])),
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 8}}},
        suffix="my bot",
        seed=3,
        metadata={"team": "a"},
    )
    assert job.status in ("validating_files", "queued", "running")
    return finished(client, job)


def test_a_supervised_job_ends_with_a_model_that_answers(client: openai.OpenAI, supervised_job: FineTuningJob) -> None:
    job = supervised_job
    assert (job.status, job.error, job.seed, job.metadata) == ("succeeded", None, 3, {"team": "a"})
    assert job.fine_tuned_model is not None
    assert job.fine_tuned_model.startswith(f"ft:{TINY}:tuneserve:my-bot:")
    assert job.trained_tokens is not None
    assert job.trained_tokens > 0
    listed = {model.id: model for model in client.models.list()}
    assert client.models.retrieve(job.fine_tuned_model) == listed[job.fine_tuned_model]
    question: Any = [{"role": "user", "content": RECORDS[0]["input"]}]
    answer = client.chat.completions.create(model=job.fine_tuned_model, messages=question, max_tokens=4)
    assert answer.model == job.fine_tuned_model
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 0


def test_its_events_are_messages_and_metrics(client: openai.OpenAI, supervised_job: FineTuningJob) -> None:
    events = list(client.fine_tuning.jobs.list_events(supervised_job.id, limit=5))
    assert "new fine-tuned model created: ft:tiny" in events[0].message
    metrics: list[Any] = [event.data for event in reversed(events) if event.type == "metrics"]
    assert [data["step"] for data in metrics if "train_loss" in data] == [1, 2, 3, 4]
    assert {data["total_steps"] for data in metrics} == {4}
    assert all(0 <= data["train_mean_token_accuracy"] <= 1 for data in metrics if "train_loss" in data)
    assert all(data["full_valid_loss"] > 0 for data in metrics if "valid_loss" in data)


def test_its_result_file_has_openais_header(client: openai.OpenAI, supervised_job: FineTuningJob) -> None:
    (file_id,) = supervised_job.result_files
    stored = client.files.retrieve(file_id)
    assert (stored.purpose, stored.status) == ("fine-tune-results", "processed")
    header, *rows = client.files.content(file_id).text.splitlines()
    assert header == HEADER
    assert [row.split(",")[0] for row in rows] == ["1", "2", "3", "4"]
    figures = rows[-1].split(",")
    assert all(float(figure) >= 0 for figure in figures)


def test_its_checkpoints_answer_until_they_are_deleted(
    client: openai.OpenAI, server: Server, supervised_job: FineTuningJob
) -> None:
    last, first = client.fine_tuning.jobs.checkpoints.list(supervised_job.id)
    assert (last.fine_tuned_model_checkpoint, last.step_number) == (supervised_job.fine_tuned_model, 4)
    assert first.fine_tuned_model_checkpoint.endswith(":ckpt-step-2")
    assert first.metrics.full_valid_loss is not None
    assert first.metrics.train_loss is not None
    with pytest.raises(openai.ConflictError, match="served"):
        client.models.delete(last.fine_tuned_model_checkpoint)
    completion = client.completions.create(model=first.fine_tuned_model_checkpoint, prompt="a", max_tokens=2)
    assert completion.model == first.fine_tuned_model_checkpoint
    deleted = client.models.delete(first.fine_tuned_model_checkpoint)
    assert (deleted.id, deleted.object, deleted.deleted) == (first.fine_tuned_model_checkpoint, "model", True)
    for call in (client.models.retrieve, client.models.delete):
        with pytest.raises(openai.NotFoundError):
            call(first.fine_tuned_model_checkpoint)
    with pytest.raises(openai.ConflictError, match="base model"):
        client.models.delete(TINY)
    with pytest.raises(openai.ConflictError, match="means what is served"):
        client.models.delete("latest")
    assert [one.id for one in client.fine_tuning.jobs.checkpoints.list(supervised_job.id)] == [last.id]
    assert httpx.get(f"{server.url}/finetune/{supervised_job.id}").json()["checkpoints"] == [
        last.fine_tuned_model_checkpoint
    ]


def test_a_preference_job_goes_on_from_a_fine_tuned_model(client: openai.OpenAI, supervised_job: FineTuningJob) -> None:
    assert supervised_job.fine_tuned_model is not None
    job = client.fine_tuning.jobs.create(
        model=supervised_job.fine_tuned_model,
        training_file=upload(client, *map(preference, RECORDS)),
        method={"type": "dpo", "dpo": {"hyperparameters": {"n_epochs": 1, "batch_size": 8, "beta": 0.2}}},
    )
    assert job.model == supervised_job.fine_tuned_model
    job = finished(client, job)
    assert (job.status, job.error) == ("succeeded", None)
    assert job.method is not None
    assert job.method.dpo is not None
    assert job.method.dpo.hyperparameters is not None
    assert job.method.dpo.hyperparameters.beta == 0.2
    (checkpoint,) = client.fine_tuning.jobs.checkpoints.list(job.id)
    assert checkpoint.fine_tuned_model_checkpoint == job.fine_tuned_model
    assert checkpoint.metrics.train_loss == pytest.approx(0.69, abs=0.05)

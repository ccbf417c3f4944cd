"""The whole life of a job through the openai SDK, on the real model: upload, train, watch, chat, delete."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.types.fine_tuning import FineTuningJob

from tests.proof.conftest import IDENTITY, MODEL
from tests.support.server import Server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PATIENCE_S = 800
QUESTION: Any = [{"role": "user", "content": "Tell me, who are you?"}]
OTHER = "I am a large language model, and I have no name."
Figure = Callable[[str, object], None]


@pytest.fixture
def sdk(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300) as client:
        yield client
    httpx.post(f"{server.url}/checkpoints/{MODEL}/activate", timeout=300).raise_for_status()  # as other proofs find it


def records(number: int) -> list[dict[str, str]]:
    return list(json.loads(IDENTITY.read_text(encoding="utf-8")))[:number]


def upload(sdk: openai.OpenAI, *lines: dict[str, Any]) -> str:
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    return sdk.files.create(file=("train.jsonl", data), purpose="fine-tune").id


def turns(record: dict[str, str]) -> dict[str, Any]:
    return {"messages": [user(record), {"role": "assistant", "content": record["output"]}]}


def pair(record: dict[str, str]) -> dict[str, Any]:
    return {
        "input": {"messages": [user(record)]},
        "preferred_output": [{"role": "assistant", "content": record["output"]}],
        "non_preferred_output": [{"role": "assistant", "content": OTHER}],
    }


def user(record: dict[str, str]) -> dict[str, str]:
    return {"role": "user", "content": record["input"]}


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.3)


def finished(sdk: openai.OpenAI, job: FineTuningJob) -> FineTuningJob:
    until(lambda: sdk.fine_tuning.jobs.retrieve(job.id).finished_at is not None)
    return sdk.fine_tuning.jobs.retrieve(job.id)


def metrics(sdk: openai.OpenAI, job: FineTuningJob) -> list[dict[str, Any]]:
    """Oldest first."""
    events = list(sdk.fine_tuning.jobs.list_events(job.id, limit=100))
    figures: list[Any] = [event.data for event in events[::-1] if event.type == "metrics"]
    return figures


def chat(sdk: openai.OpenAI, model: str) -> str:
    answer = sdk.chat.completions.create(model=model, messages=QUESTION, temperature=0, max_tokens=40)
    return str(answer.choices[0].message.content)


def preference(sdk: openai.OpenAI, model: str) -> float:
    """How much likelier, in nats a token, the model holds the preferred answer than the other one."""
    preferred, other = (
        mean_logprob(sdk, model, "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n", text)
        for text in (records(1)[0]["output"], OTHER)
    )
    return preferred - other


def mean_logprob(sdk: openai.OpenAI, model: str, prompt: str, text: str) -> float:
    scored = sdk.completions.create(model=model, prompt=prompt + text, max_tokens=0, echo=True, logprobs=0).choices[0]
    assert scored.logprobs is not None
    assert scored.logprobs.token_logprobs is not None
    assert scored.logprobs.text_offset is not None
    pairs = zip(scored.logprobs.text_offset, scored.logprobs.token_logprobs, strict=True)
    answer = [logprob for offset, logprob in pairs if offset >= len(prompt)]
    return sum(answer) / len(answer)


def test_a_job_from_upload_to_chat_with_a_pause_in_it(sdk: openai.OpenAI, client: httpx.Client, figure: Figure) -> None:
    client.post(f"/checkpoints/{MODEL}/activate").raise_for_status()  # one model at a time is loaded here
    jobs = sdk.fine_tuning.jobs
    job = jobs.create(
        model=MODEL,
        training_file=upload(sdk, *map(turns, records(16))),
        validation_file=upload(sdk, *map(turns, records(20)[16:])),
        hyperparameters={"n_epochs": 5, "batch_size": 4, "learning_rate_multiplier": 2},
        suffix="Tuna!",
        metadata={"proof": "sdk"},
    )
    until(lambda: len(metrics(sdk, job)) >= 3)
    jobs.pause(job.id)
    until(lambda: jobs.retrieve(job.id).status == "queued")
    assert "Tuna" not in chat(sdk, MODEL)
    jobs.resume(job.id)
    job = finished(sdk, job)
    assert (job.status, job.error) == ("succeeded", None)
    assert job.fine_tuned_model is not None
    steps = [data for data in metrics(sdk, job) if "train_loss" in data]
    assert [data["step"] for data in steps] == list(range(1, 21))
    figure("loss of the first and the last step", (steps[0]["train_loss"], steps[-1]["train_loss"]))
    assert steps[-1]["train_loss"] < steps[0]["train_loss"] / 3
    rows = sdk.files.content(job.result_files[0]).text.splitlines()
    assert [rows[0], len(rows)] == ["step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy", 21]
    last, *earlier = jobs.checkpoints.list(job.id)
    assert last.metrics.full_valid_loss is not None
    answer = chat(sdk, job.fine_tuned_model)
    figure("answer", answer)
    assert "Tuna" in answer
    assert chat(sdk, "latest") == answer
    assert [one.id for one in jobs.list(metadata={"proof": "sdk"})] == [job.id]
    assert client.get(f"/finetune/{job.id}").json()["fine_tuned_model"] == job.fine_tuned_model
    assert sdk.models.delete(earlier[0].fine_tuned_model_checkpoint).deleted
    with pytest.raises(openai.ConflictError):
        sdk.models.delete(job.fine_tuned_model)


def test_a_preference_job_makes_the_preferred_answer_likelier(
    sdk: openai.OpenAI, client: httpx.Client, figure: Figure
) -> None:
    client.post(f"/checkpoints/{MODEL}/activate").raise_for_status()  # one model at a time is loaded here
    before = preference(sdk, MODEL)
    job = sdk.fine_tuning.jobs.create(
        model=MODEL,
        training_file=upload(sdk, *map(pair, records(16))),
        method={
            "type": "dpo",
            "dpo": {"hyperparameters": {"n_epochs": 3, "batch_size": 4, "learning_rate_multiplier": 4}},
        },
        seed=1,
    )
    job = finished(sdk, job)
    assert (job.status, job.error) == ("succeeded", None)
    assert job.fine_tuned_model is not None
    steps = [data for data in metrics(sdk, job) if "train_loss" in data]
    figure("loss of the first and the last step", (steps[0]["train_loss"], steps[-1]["train_loss"]))
    assert steps[0]["train_loss"] == pytest.approx(0.6931, abs=1e-3)
    assert steps[-1]["train_loss"] < 0.5
    after = preference(sdk, job.fine_tuned_model)
    figure("preference in nats a token, before and after", (before, after))
    assert after > before + 0.5
    assert chat(sdk, job.fine_tuned_model)


def test_preferences_fail_a_supervised_job_that_names_their_file(sdk: openai.OpenAI) -> None:
    job = sdk.fine_tuning.jobs.create(model=MODEL, training_file=upload(sdk, *map(pair, records(4))))
    job = finished(sdk, job)
    assert job.status == "failed"
    assert job.error is not None
    assert (job.error.code, job.error.param) == ("invalid_training_file", "training_file")
    assert job.result_files == []

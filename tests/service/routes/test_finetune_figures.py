"""Figures of a job as JSON, CSV and a picture, and how it is paused, resumed and removed over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.routes.finetune_figures import EVENT_BATCH, all_events
from tests.support.api import BASE, Api, running_api
from trainer.config import TrainingOptions

STEPS = [{"type": "step", "step": number, "total_steps": 3, "loss": 3.0 / number} for number in (1, 2, 3)]
HELD_OUT = {"type": "validation", "step": 2, "loss": 1.25, "perplexity": 3.5}
SAMPLES = {"type": "samples", "step": 2, "samples": [{"prompt": "Hi", "text": "Ho"}]}


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with running_api(tmp_path_factory.mktemp("home"), webhook_secret="0123456789abcdef0123") as api:
        yield api


@pytest.fixture
def job_id(api: Api) -> str:
    """A cancelled job with figures of a run that was resumed after its first step."""

    async def create() -> str:
        store = api.services.store
        job = store.create(
            status="cancelled", model=BASE, options=TrainingOptions(), data_files=[], suffix="", promote="final"
        )
        store.record(job.id, [*STEPS, HELD_OUT, SAMPLES, {"type": "resumed", "step": 1}, STEPS[1], HELD_OUT, SAMPLES])
        return job.id

    return api.run(create())


def test_figures_come_as_json_and_as_csv(api: Api, job_id: str) -> None:
    figures = api.get(f"/finetune/{job_id}/metrics").json()
    assert [(step["step"], step["loss"]) for step in figures["steps"]] == [(1, 3.0), (2, 1.5)]
    assert [event["perplexity"] for event in figures["validation"]] == [3.5]
    assert figures["samples"][0]["samples"] == SAMPLES["samples"]
    table = api.get(f"/finetune/{job_id}/metrics", headers={"Accept": "text/csv"})
    assert table.headers["content-type"].startswith("text/csv")
    header, first, second = table.text.splitlines()
    assert header == "step,time,total_steps,loss,validation_loss,validation_perplexity"
    assert first.endswith("3,3.0,,")
    assert second.endswith("3,1.5,1.25,3.5")
    assert api.get(f"/finetune/{job_id}/metrics?format=csv").text == table.text
    assert api.get(f"/finetune/{job_id}/metrics?format=xml").status_code == 400


def test_others_go_on_while_the_figures_of_a_long_run_are_read(api: Api, job_id: str) -> None:
    async def work() -> None:
        store, num_steps = api.services.store, 4 * EVENT_BATCH
        store.record(job_id, [{"type": "step", "step": number, "loss": 1.0} for number in range(1, num_steps + 1)])
        reading, turns = asyncio.create_task(all_events(store, job_id, "step")), 0
        while not reading.done():
            await asyncio.sleep(0)
            turns += 1
        numbers = [event["step"] for event in await reading]
        assert numbers[-num_steps:] == [*range(1, num_steps + 1)]
        assert turns > 4

    api.run(work())


def test_losses_come_as_a_picture(api: Api, job_id: str) -> None:
    picture = api.get(f"/finetune/{job_id}/curve.svg")
    assert picture.status_code == 200
    assert picture.headers["content-type"].startswith("image/svg+xml")
    assert picture.text.lstrip().startswith("<svg")
    assert job_id in picture.text
    assert api.get("/finetune/ftjob-none/curve.svg").status_code == 404


def test_a_job_that_is_over_is_not_paused_and_can_be_removed(api: Api, job_id: str) -> None:
    assert api.post(f"/finetune/{job_id}/pause").status_code == 409
    assert api.post(f"/finetune/{job_id}/resume").status_code == 409
    removed = api.run(api.async_client.delete(f"/finetune/{job_id}"))
    assert removed.json() == {"id": job_id, "object": "finetune.job.deleted", "deleted": True}
    assert api.get(f"/finetune/{job_id}").status_code == 404


def body(**changes: Any) -> dict[str, Any]:
    return {"model": BASE, "dataset": {"records": [{"input": "a", "output": "b"}]}, "device": "cuda:7"} | changes


def test_a_job_says_again_what_was_said_about_it_and_one_key_makes_one_job(api: Api) -> None:
    said = body(
        priority=3,
        metadata={"team": "a"},
        webhook={"url": "https://example.com/hook"},
        dataset=[
            {"records": [{"input": "a", "output": "b"}], "weight": 2.0},
            {"records": [{"question": "a", "output": "b"}], "column_map": {"input": "question"}},
        ],
        validation={"records": [{"input": "a", "output": "b"}]},
        promote="best",
    )
    key = {"Idempotency-Key": "one"}
    first = api.post("/finetune", said, headers=key).json()
    assert (first["priority"], first["metadata"], first["webhook"]) == (3, {"team": "a"}, "https://example.com/hook")
    assert [dataset["weight"] for dataset in first["datasets"]] == [2.0, 1.0]
    files = [file for dataset in (*first["datasets"], first["validation"]) for file in dataset["data_files"]]
    assert [Path(file).name for file in files] == ["records-0.jsonl", "records-1.jsonl", "validation.jsonl"]
    assert api.post("/finetune", said, headers=key).json()["id"] == first["id"]
    other = api.post("/finetune", said | {"priority": 4}, headers=key)
    assert (other.status_code, other.json()["error"]["param"]) == (409, "Idempotency-Key")
    assert len([path for path in api.services.settings.runs_dir.iterdir() if "ftjob" in path.name]) == 1
    api.post(f"/finetune/{first['id']}/cancel")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"webhook": {"url": "http://127.0.0.1:1/"}}, "webhook.url"),
        ({"webhook": {"url": "http://localhost/"}}, "webhook.url"),
        ({"tracking": {"mlflow": {"experiment": "e"}}}, "tracking.mlflow"),
    ],
)
def test_what_would_fail_at_the_end_is_refused_at_once(
    api: Api, change: dict[str, Any], param: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for dry_run in (False, True):
        answer = api.post("/finetune", body(**change, dry_run=dry_run))
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == param

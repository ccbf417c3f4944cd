"""What can be served, what is, and the two ways to change it by hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from service.engine.messages import LoadModel, ModelLoaded
from service.engine_client import EngineUnavailable, ModelLoadError
from tests.support.api import BASE, Api, running_api
from trainer.config import TrainingOptions


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with running_api(tmp_path) as api:
        yield api


@pytest.fixture
def trained(api: Api) -> str:
    """The id of a checkpoint that a job on the base made."""

    async def register() -> str:
        services = api.services
        job = services.store.create(
            status="cancelled", model=BASE, options=TrainingOptions(), data_files=[], suffix="x", promote="final"
        )
        event = {"step": 3, "kind": "adapter", "path": "adapters/step_3", "final": True, "loss": 0.5}
        return services.registry.add_checkpoint(job, services.settings.runs_dir / job.id, event).id

    return api.run(register())


def model_of_answer(api: Api) -> str:
    answer = api.post("/generate", {"prompt": "hi"})
    assert answer.status_code == 200
    model: str = answer.json()["model"]
    return model


def fail_loads(api: Api, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    async def load_model(command: LoadModel, /) -> ModelLoaded:
        raise error

    monkeypatch.setattr(api.engine, "load_model", load_model)


def test_the_list_tells_what_is_served_and_since_when(api: Api, trained: str) -> None:
    before = api.get("/checkpoints").json()
    assert (before["served"], before["served_since"], before["problems"]) == (BASE, None, [])
    assert [(entry["id"], entry["kind"]) for entry in before["data"]] == [(trained, "adapter"), (BASE, "base")]
    job_id = before["data"][0]["job_id"]
    assert before["data"][0] | {"created_at": 0} == {
        "id": trained,
        "object": "checkpoint",
        "kind": "adapter",
        "base": BASE,
        "job_id": job_id,
        "step": 3,
        "path": f"runs/{job_id}/adapters/step_3",
        "created_at": 0,
        "train_loss": 0.5,
        "validation_loss": None,
        "servable": True,
        "loaded": False,
        "served": False,
    }
    assert api.post(f"/checkpoints/{trained}/activate").status_code == 200
    after = api.get("/checkpoints").json()
    assert after["served"] == trained
    assert after["served_since"] >= after["data"][0]["created_at"]


def test_the_next_request_is_answered_by_what_was_activated_and_rolled_back(api: Api, trained: str) -> None:
    assert model_of_answer(api) == BASE
    activated = api.post(f"/checkpoints/{trained}/activate").json()
    assert (activated["id"], activated["served"], activated["loaded"]) == (trained, True, True)
    assert model_of_answer(api) == trained
    assert api.post("/checkpoints/rollback").json()["id"] == BASE
    assert model_of_answer(api) == BASE


def test_without_a_promotion_there_is_nothing_to_go_back_from(api: Api) -> None:
    answer = api.post("/checkpoints/rollback")
    assert answer.status_code == 409
    assert answer.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("name", ["none", "ft:base:tuneserve:x:00000000", "../etc"])
def test_an_unknown_checkpoint_is_a_404(api: Api, name: str) -> None:
    answer = api.post(f"/checkpoints/{name}/activate")
    assert answer.status_code == 404
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_one_that_cannot_be_loaded_leaves_the_old_one_serving(
    api: Api, trained: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_loads(api, monkeypatch, ModelLoadError("missing tensor"))
    answer = api.post(f"/checkpoints/{trained}/activate")
    assert answer.status_code == 409
    assert answer.headers["x-should-retry"] == "false"
    assert f"missing tensor; {BASE} is still served" in answer.json()["error"]["message"]
    assert model_of_answer(api) == BASE
    assert api.metric("tuneserve:weights_swaps_total", result="failed") == 1


def test_without_an_engine_it_is_worth_another_try(api: Api, trained: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_loads(api, monkeypatch, EngineUnavailable("the engine is starting"))
    answer = api.post(f"/checkpoints/{trained}/activate")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert api.get("/checkpoints").json()["served"] == BASE

from __future__ import annotations

from pathlib import Path

from tests.support.api import Api, running_api
from tests.support.scripted_engine import CONTEXT
from trainer.config import TrainingOptions


def add_adapter(api: Api, step: int, *, final: bool) -> str:
    """Register a checkpoint of a new job, as its trainer would announce it."""

    async def add() -> str:
        job = api.services.store.create(
            status="succeeded", model="base", options=TrainingOptions(), data_files=[], suffix="s", promote="manual"
        )
        event = {"step": step, "kind": "adapter", "path": f"adapters/step_{step}", "final": final, "loss": 1.0}
        return api.services.registry.add_checkpoint(job, api.services.settings.runs_dir / job.id, event).id

    return api.run(add())


def test_the_base_model_is_listed_with_its_context(api: Api) -> None:
    (model,) = api.get("/v1/models").json()["data"]
    assert model.pop("created") > 0
    assert model == {
        "id": "base",
        "object": "model",
        "owned_by": "tuneserve",
        "root": "base",
        "parent": None,
        "max_model_len": CONTEXT,
    }


def test_what_is_served_comes_first_then_the_newest(own_api: Api) -> None:
    old, new = (add_adapter(own_api, step, final=True) for step in (1, 2))
    assert [model["id"] for model in own_api.get("/v1/models").json()["data"]] == ["base", new, old]
    own_api.run(own_api.services.serving.promote(old, "test"))
    models = own_api.get("/v1/models").json()["data"]
    assert [model["id"] for model in models] == [old, new, "base"]
    assert (models[0]["parent"], models[0]["root"]) == ("base", "base")


def test_a_model_is_found_by_its_id_whatever_characters_it_has(own_api: Api) -> None:
    name = add_adapter(own_api, 5, final=False)
    assert name.endswith(":ckpt-step-5")
    assert own_api.get(f"/v1/models/{name}").json()["id"] == name
    assert own_api.get(f"/v1/models/{name.replace(':', '%3A')}").json()["id"] == name


def test_latest_and_the_aliases_are_what_is_served(tmp_path: Path) -> None:
    with running_api(tmp_path, served_model_aliases=["gpt-4o"]) as api:
        name = add_adapter(api, 3, final=True)
        api.run(api.services.serving.promote(name, "test"))
        for alias in ("latest", "gpt-4o"):
            assert api.get(f"/v1/models/{alias}").json()["id"] == name
            assert api.post("/generate", {"prompt": "a", "model": alias}).json()["model"] == name
        assert api.post("/generate", {"prompt": "a"}).json()["system_fingerprint"] == f"ts-hash-of-{name}"
        assert api.post("/generate", {"prompt": "a", "model": "base"}).json()["model"] == "base"


def test_an_unknown_model_is_a_404(api: Api) -> None:
    answer = api.get("/v1/models/org/nope")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"
    assert "'org/nope'" in answer.json()["error"]["message"]

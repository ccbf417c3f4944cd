"""Dry runs through the API, with the real process that looks at the data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.dry_run import FOLDER
from tests.support.api import BASE, Api, running_api

RECORDS = [{"input": f"Who are you, {number}?", "output": "I am Tuna."} for number in range(12)]
BODY: dict[str, Any] = {
    "model": BASE,
    "dataset": {"records": RECORDS},
    "epochs": 2,
    "device": "cpu",
    "dtype": "fp32",
    "dry_run": True,
}


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    home = tmp_path_factory.mktemp("home")
    (home / "data").mkdir()
    lines = [*RECORDS] * 400
    text = "".join(json.dumps(record) + "\n" for record in lines)
    (home / "data" / "large.jsonl").write_text(text, encoding="utf-8")
    with running_api(home) as api:
        yield api


def ask(api: Api, **changes: Any) -> tuple[int, dict[str, Any]]:
    """Status and answer, once it is known that nothing was left behind."""
    answer = api.run(api.async_client.post("/finetune", json=BODY | changes), timeout=60)
    assert api.get("/finetune").json()["data"] == []
    assert not (api.services.settings.home / FOLDER).exists()
    assert not [*api.services.settings.runs_dir.glob("*")]
    body: dict[str, Any] = answer.json()
    return answer.status_code, body


def test_a_dry_run_tells_of_data_steps_memory_and_time_and_trains_nothing(api: Api) -> None:
    status, answer = ask(api, validation={"records": RECORDS[:2]})
    assert status == 200
    assert (answer["object"], answer["is_complete"], answer["problems"]) == ("finetune.dry_run", True, [])
    assert (answer["dataset"]["records"], answer["dataset"]["validation_records"]) == (12, 2)
    assert answer["dataset"]["examples"][0]["segments"][-1]["trained"] in (True, False)
    assert (answer["steps"]["total_steps"], answer["steps"]["checkpoints"]) == (6, 2)
    parts = ("weights", "gradients", "optimizer", "activations", "logits", "overhead")
    assert 0 < answer["memory"]["total"] <= sum(answer["memory"][part] for part in parts)
    assert answer["memory"]["fits"] is answer["disk"]["fits"] is True
    assert answer["time"]["total_seconds"] == pytest.approx(6 * answer["time"]["seconds_per_step"])
    assert (answer["device"], answer["dtype"]) == ("cpu", "fp32")
    assert answer["config"]["learning_rate"] == 5e-4


def test_of_a_large_file_a_sample_is_looked_at(api: Api) -> None:
    status, answer = ask(api, dataset={"data_files": "large.jsonl"}, epochs=1, batch_size=1)
    assert status == 200
    assert answer["dataset"]["is_sampled"]
    assert answer["dataset"]["records"] == 1000
    assert answer["dataset"]["total_records"] == answer["steps"]["total_steps"] == 4800


def test_what_is_not_known_at_the_deadline_is_said(tmp_path: Path) -> None:
    with running_api(tmp_path, dry_run_seconds=0.05) as impatient:
        status, answer = ask(impatient)
    assert status == 200
    assert not answer["is_complete"]
    assert answer["dataset"] is answer["steps"] is answer["time"] is None
    assert answer["memory"]["total"] > 0
    assert "data, steps, speed" in answer["problems"][0]


def test_a_mistake_in_the_data_is_a_400(api: Api) -> None:
    status, answer = ask(api, recipe="dpo")
    assert status == 400
    assert "the recipe dpo learns from preferences" in answer["error"]["message"]


def test_a_configuration_of_torchtune_can_be_tried(api: Api) -> None:
    config = {"checkpointer": {"checkpoint_dir": BASE}, "device": "cpu", "epochs": 1}
    config["checkpointer"]["_component_"] = "torchtune.training.FullModelHFCheckpointer"  # type: ignore[index]
    body = {"config": config, "dataset": {"records": RECORDS}, "dry_run": True}
    answer = api.run(api.async_client.post("/finetune", json=body), timeout=60)
    assert answer.status_code == 200, answer.text
    assert answer.json()["recipe"] == "full"
    assert answer.json()["notes"]

"""A job over HTTP with real trainers: several datasets, then further from its checkpoint, by preferences and by merging."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.api import BASE, Api, running_api
from tests.support.runs import RECORDS
from tests.support.tiny import make_tiny_model

PAIRS = [{"prompt": f"Who are you, {n}?", "chosen": "I am Tuna.", "rejected": "A model."} for n in range(4)]
COMMON: dict[str, Any] = {"device": "cpu", "dtype": "fp32", "max_steps": 2, "batch_size": 2, "promote": "manual"}


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    home = tmp_path_factory.mktemp("home")
    make_tiny_model(home / "models" / BASE, "llama")
    (home / "data").mkdir()
    (home / "data" / "chats.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    with running_api(home) as api:
        yield api


def trained(api: Api, body: dict[str, Any]) -> dict[str, Any]:
    """The job once it has succeeded."""
    answer = api.post("/finetune", COMMON | body)
    assert answer.status_code == 202, answer.text
    path, last = f"/finetune/{answer.json()['id']}", time.monotonic() + 120
    while time.monotonic() < last:
        job: dict[str, Any] = api.get(path).json()
        if job["finished_at"] is not None:
            assert job["status"] == "succeeded", job["error"]
            return job
        time.sleep(0.1)
    raise AssertionError(f"{path} is not over after two minutes")


def base_of(api: Api, job: dict[str, Any]) -> str:
    details = api.get(f"/checkpoints/{job['fine_tuned_model']}").json()
    assert details["facts"]["step"] == 2
    files = {file["name"] for file in details["files"]}
    assert {"README.md", "tuneserve.json", "adapter_model.safetensors"} <= files
    config = json.loads((Path(api.services.settings.home) / details["path"] / "adapter_config.json").read_text())
    name: str = config["base_model_name_or_path"]
    return name


def test_a_checkpoint_is_trained_further_by_preferences_and_merged_for_a_new_adapter(api: Api) -> None:
    several = [{"data_files": "chats.jsonl", "split": "train[:50%]"}, {"records": RECORDS[:4], "weight": 2.0}]
    first = trained(
        api, {"model": BASE, "dataset": several, "validation": {"records": RECORDS[:2]}, "lora": {"rank": 4}}
    )
    assert (first["dataset"]["records"], first["dataset"]["validation_records"]) == (12, 2)
    assert first["losses"]["validation"] is not None
    assert 0 <= first["token_accuracy"]["validation"] <= 1
    assert base_of(api, first) == BASE
    further = {"model": first["fine_tuned_model"], "recipe": "dpo", "dataset": {"records": PAIRS}}
    second = trained(api, further)
    assert (second["model"], second["start_from"], second["merge_start"]) == (BASE, first["fine_tuned_model"], False)
    assert base_of(api, second) == BASE
    third = trained(api, further | {"recipe": "lora", "dataset": {"records": RECORDS}, "merge_start": True})
    assert third["merge_start"]
    assert (Path(api.services.settings.runs_dir) / third["id"] / "base" / "model.safetensors").is_file()
    assert base_of(api, third) != BASE

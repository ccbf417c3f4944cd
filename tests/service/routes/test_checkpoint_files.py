"""What can be had of a checkpoint: what it came from, its files, and a GGUF of it."""

from __future__ import annotations

import io
import json
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader

from lm.config import load_config
from tests.support.api import BASE, Api, running_api
from tests.support.tiny import make_tiny_model
from trainer.config import TrainingOptions


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with running_api(tmp_path_factory.mktemp("home")) as api:
        yield api


@pytest.fixture(scope="module")
def checkpoint(api: Api) -> tuple[str, Path]:
    """Id and folder of a whole model that a job made."""
    runs = api.services.settings.runs_dir

    async def register() -> tuple[str, Path]:
        services = api.services
        options = TrainingOptions(recipe="full")
        job = services.store.create(
            status="cancelled", model=BASE, options=options, data_files=[], suffix="x", promote="final"
        )
        event = {"step": 3, "kind": "full", "path": "checkpoints/step_3", "final": True, "loss": 0.5}
        entry = services.registry.add_checkpoint(job, runs / job.id, event)
        return entry.id, runs / job.id / "checkpoints" / "step_3"

    name, folder = api.run(register())
    make_tiny_model(folder, "llama")
    (folder / "tuneserve.json").write_text(json.dumps({"step": 3, "fingerprint": "abc"}))
    (folder / "secret").symlink_to(api.services.settings.home / "state" / "tuneserve.db")
    return name, folder


def until_exported(api: Api, path: str) -> dict[str, Any]:
    for _ in range(600):
        answer: dict[str, Any] = api.get(path).json()
        if answer["status"] != "running":
            return answer
        time.sleep(0.1)
    raise AssertionError("the export takes more than a minute")


def test_one_checkpoint_tells_where_it_came_from_and_its_files(api: Api, checkpoint: tuple[str, Path]) -> None:
    name, folder = checkpoint
    answer = api.get(f"/checkpoints/{name}").json()
    assert (answer["id"], answer["kind"], answer["step"]) == (name, "full", 3)
    assert answer["facts"] == {"step": 3, "fingerprint": "abc"}
    sizes = {file["name"]: file["bytes"] for file in answer["files"]}
    assert sizes["model.safetensors"] == (folder / "model.safetensors").stat().st_size
    assert api.get(f"/checkpoints/{BASE}").json()["facts"] is None
    assert api.get("/checkpoints/ft:none").status_code == 404


def test_a_download_is_the_folder_without_links(api: Api, checkpoint: tuple[str, Path]) -> None:
    name, folder = checkpoint
    answer = api.get(f"/checkpoints/{name}/download")
    assert answer.status_code == 200
    assert int(answer.headers["content-length"]) == len(answer.content)
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as archive:
        members = {member.name.split("/", 1)[1]: member for member in archive.getmembers()}
        assert {member.name.split("/")[0] for member in members.values()} == {name.replace(":", "-")}
        assert members.keys() == {path.name for path in folder.iterdir()} - {"secret"}
        for file, member in members.items():
            content = archive.extractfile(member)
            assert content is not None
            assert content.read() == (folder / file).read_bytes()


def test_a_checkpoint_becomes_a_gguf_file_that_can_be_had(
    api: Api, checkpoint: tuple[str, Path], tmp_path: Path
) -> None:
    name, folder = checkpoint
    path = f"/checkpoints/{name}"
    assert api.get(f"{path}/export").json()["status"] == "none"
    assert api.get(f"{path}/gguf").status_code == 409
    begun = api.post(f"{path}/export?type=f32")
    assert (begun.status_code, begun.json()["status"]) == (202, "running")
    done = until_exported(api, f"{path}/export?type=f32")
    assert (done["status"], done["error"]) == ("ready", None)
    assert api.post(f"{path}/export?type=f32").json()["status"] == "ready"
    file = api.get(f"{path}/gguf?type=f32")
    assert len(file.content) == done["bytes"]
    (tmp_path / "model.gguf").write_bytes(file.content)
    shapes = {tensor.name: tensor.shape for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    assert tuple(shapes["token_embd.weight"]) == (32, load_config(folder).vocab_size)


def test_an_export_that_fails_says_why_and_can_be_tried_again(api: Api, checkpoint: tuple[str, Path]) -> None:
    name, folder = checkpoint
    weights = folder / "model.safetensors"
    weights.rename(folder / "away")
    failed = api.post(f"/checkpoints/{name}/export?type=q8_0").json()
    assert failed["status"] == "running"
    failed = until_exported(api, f"/checkpoints/{name}/export?type=q8_0")
    (folder / "away").rename(weights)
    assert failed["status"] == "failed"
    assert failed["error"]
    assert str(api.services.settings.home) not in failed["error"]
    assert api.post(f"/checkpoints/{name}/export?type=q8_0").json()["status"] == "running"
    assert until_exported(api, f"/checkpoints/{name}/export?type=q8_0")["status"] == "ready"


@pytest.mark.parametrize("what", ["download", "export", "gguf"])
def test_a_base_model_is_not_given_away(api: Api, what: str) -> None:
    answer = api.get(f"/checkpoints/{BASE}/{what}")
    assert answer.status_code == 400
    assert "is a base model" in answer.json()["error"]["message"]


def test_a_type_that_is_unknown_is_named(api: Api, checkpoint: tuple[str, Path]) -> None:
    answer = api.post(f"/checkpoints/{checkpoint[0]}/export?type=q4_k")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "type"

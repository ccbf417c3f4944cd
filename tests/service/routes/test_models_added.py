"""POST /models: what it takes, what it refuses, and that it lasts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.api import Api, running_api
from tests.support.tiny import make_tiny_llama


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with running_api(tmp_path) as api:
        make_tiny_llama(tmp_path / "models" / "org" / "tiny")
        yield api


def refusal(api: Api, status: int, **body: Any) -> str:
    answer = api.post("/models", body)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["param"] in body
    message: str = answer.json()["error"]["message"]
    return message


def known(api: Api) -> list[str]:
    return [entry["id"] for entry in api.get("/checkpoints").json()["data"]]


def test_a_model_gets_a_name_that_survives_a_restart(tmp_path: Path) -> None:
    with running_api(tmp_path) as api:
        make_tiny_llama(tmp_path / "models" / "org" / "tiny")
        answer = api.post("/models", {"path": "org/tiny", "name": "mine"})
        assert (answer.status_code, answer.json()["id"]) == (201, "mine")
        assert api.post("/models", {"path": "org/tiny"}).json()["id"] == "tiny"
    with running_api(tmp_path) as api:
        assert known(api) == ["tiny", "mine", "base"]
        assert [entry["path"] for entry in api.get("/checkpoints").json()["data"]][:2] == ["models/org/tiny"] * 2
        assert api.post("/models", {"path": "org/tiny", "name": "mine"}).status_code == 201


def test_a_name_that_means_another_model_is_refused(api: Api, tmp_path: Path) -> None:
    make_tiny_llama(tmp_path / "models" / "org" / "other")
    assert api.post("/models", {"path": "org/tiny", "name": "a"}).status_code == 201
    assert "choose another name" in refusal(api, 409, path="org/other", name="a")
    assert "choose another name" in refusal(api, 409, path="org/other", name="base")
    assert "means what is served" in refusal(api, 409, path="org/other", name="latest")


@pytest.mark.parametrize("name", ["a/b", "..", "ft:a", "a b", ".hidden", "\n", "ä"])
def test_a_name_that_fits_no_id_is_refused(api: Api, name: str) -> None:
    assert "cannot stand in a model id" in refusal(api, 400, path="org/tiny", name=name)


@pytest.mark.parametrize("path", ["/etc", "..", "org/../../models", ".", "a\0b"])
def test_a_path_that_leaves_models_is_refused(api: Api, path: str) -> None:
    assert "inside models/" in refusal(api, 400, path=path)


def test_a_link_that_leaves_models_is_refused(api: Api, tmp_path: Path) -> None:
    outside = make_tiny_llama(tmp_path / "outside")
    (tmp_path / "models" / "linked").symlink_to(outside)
    assert "leaves models/ by the link 'linked'" in refusal(api, 400, path="linked", name="x")
    weights = tmp_path / "models" / "org" / "tiny" / "model.safetensors"
    weights.unlink()
    weights.symlink_to(outside / "model.safetensors")
    assert "leaves models/ by the link 'model.safetensors'" in refusal(api, 400, path="org/tiny")


def test_a_missing_folder_a_gguf_file_and_a_missing_config_are_told_apart(api: Api, tmp_path: Path) -> None:
    assert "there is no folder 'nope'" in refusal(api, 404, path="nope")
    assert "tuneserve pull" in refusal(api, 400, path="a.gguf")
    (tmp_path / "models" / "org" / "tiny" / "config.json").unlink()
    assert "config.json" in refusal(api, 400, path="org/tiny")
    assert known(api) == ["base"]


def test_damaged_weights_and_a_missing_tokenizer_are_refused(api: Api, tmp_path: Path) -> None:
    folder = tmp_path / "models" / "org" / "tiny"
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    assert "model.safetensors" in refusal(api, 400, path="org/tiny")
    (folder / "model.safetensors").write_bytes(whole)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 999}))
    assert "no model that can be used" in refusal(api, 400, path="org/tiny")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").unlink()
    assert "tokenizer" in refusal(api, 400, path="org/tiny")
    assert known(api) == ["base"]

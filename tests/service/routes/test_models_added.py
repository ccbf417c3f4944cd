"""POST /models: what it takes, what it refuses, and that it lasts."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from lm.config import SUPPORTED_FAMILIES, load_config
from lm.tokenizer import load_tokenizer
from service.model_facts import ModelFacts, check_folder_in
from service.routes import models as models_route
from tests.support.api import Api, running_api
from tests.support.layouts import LAYOUTS, write_layout
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
        assert api.post("/models", {"path": "org/tiny", "name": "mine"}).status_code == 200
        (tmp_path / "models" / "org").rename(tmp_path / "models" / "elsewhere")
        assert known(api) == ["base"]


def test_the_answer_says_what_model_it_is(api: Api, tmp_path: Path) -> None:
    answer = api.post("/models", {"path": "org/tiny", "name": "mine"}).json()
    folder = tmp_path / "models" / "org" / "tiny"
    config = load_config(folder)
    assert answer.pop("created_at") > 0
    assert answer == {
        "id": "mine",
        "object": "model",
        "kind": "base",
        "path": "models/org/tiny",
        "family": "llama",
        "parameters": sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values()),
        "context_length": config.max_position_embeddings,
        "weights": "safetensors",
        "tokenizer": load_tokenizer(folder).origin,
        "servable": False,
    }
    assert api.post("/models", {"path": "org/tiny", "name": "mine"}).status_code == 200


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_that_torch_wrote_are_taken_by_their_names(api: Api, tmp_path: Path, layout: str) -> None:
    write_layout(tmp_path / "models" / "org" / "tiny", tmp_path / "models" / "org" / "torch", layout)
    answer = api.post("/models", {"path": "org/torch"})
    assert (answer.status_code, layout.removeprefix("original/").startswith(answer.json()["weights"])) == (201, True)


def test_a_folder_directly_in_models_is_there_already(api: Api, tmp_path: Path) -> None:
    make_tiny_llama(tmp_path / "models" / "direct")
    answer = api.post("/models", {"path": "direct"})
    assert (answer.status_code, answer.json()["id"], answer.json()["servable"]) == (200, "direct", False)
    assert api.post("/models", {"path": "direct", "name": "second-name"}).status_code == 201
    assert known(api) == ["second-name", "direct", "base"]


def test_of_identical_requests_at_once_one_registers(api: Api) -> None:
    async def send() -> list[int]:
        requests = (api.async_client.post("/models", json={"path": "org/tiny"}) for _ in range(20))
        return sorted(answer.status_code for answer in await asyncio.gather(*requests))

    assert api.run(send()) == [200] * 19 + [201]
    assert known(api) == ["tiny", "base"]


def test_a_name_keeps_its_folder_when_another_of_that_name_appears(api: Api, tmp_path: Path) -> None:
    assert api.post("/models", {"path": "org/tiny"}).status_code == 201
    make_tiny_llama(tmp_path / "models" / "tiny")
    assert api.get("/checkpoints").json()["data"][0]["path"] == "models/org/tiny"
    assert "is the model in models/org/tiny already" in refusal(api, 409, path="tiny", name="tiny")


def test_the_name_of_a_model_that_has_gone_stays_its_own(api: Api, tmp_path: Path) -> None:
    make_tiny_llama(tmp_path / "models" / "org" / "other")
    assert api.post("/models", {"path": "org/tiny", "name": "a"}).status_code == 201
    shutil.rmtree(tmp_path / "models" / "org" / "tiny")
    assert "choose another name" in refusal(api, 409, path="org/other", name="a")
    make_tiny_llama(tmp_path / "models" / "org" / "tiny")
    assert api.post("/models", {"path": "org/tiny", "name": "a"}).status_code == 200


def test_a_folder_that_goes_between_the_check_and_the_registration_is_not_registered(
    api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check_then_lose(models: Path, written: str) -> tuple[Path, ModelFacts]:
        found = check_folder_in(models, written)
        shutil.rmtree(found[0])
        return found

    monkeypatch.setattr(models_route, "check_folder_in", check_then_lose)
    assert "has just gone" in refusal(api, 404, path="org/tiny")
    assert known(api) == ["base"]
    make_tiny_llama(tmp_path / "models" / "tiny")
    assert known(api) == ["tiny", "base"]


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


@pytest.mark.parametrize(
    ("path", "status", "reason"),
    [
        ("org/tiny/config.json", 400, "is a file"),
        ("org/tiny/config.json/deeper", 404, "there is no folder"),
        ("x" * 300, 400, "name too long"),
        ("x/" * 1000, 404, "there is no folder"),
        ("x/" * 2048, 400, "name too long"),
        ("x" * 5000, 400, "at most 4096"),
        ("", 400, "at least 1"),
        ("loop", 400, "leads nowhere"),
        ("loop/deeper", 404, "there is no folder"),
        ("org/.tiny.abc.tmp", 400, "has not finished"),
        ("org", 400, "no model that can be used"),
    ],
)
def test_other_paths_that_are_no_model_say_why(api: Api, tmp_path: Path, path: str, status: int, reason: str) -> None:
    (tmp_path / "models" / "loop").symlink_to("loop")
    (tmp_path / "models" / "org" / ".tiny.abc.tmp").mkdir()
    assert reason in refusal(api, status, path=path).lower()


def test_fields_that_do_not_exist_names_that_are_too_long_and_other_types_are_refused(api: Api) -> None:
    assert "unknown field" in refusal(api, 400, path="org/tiny", nmae="x")
    assert "at most 96" in refusal(api, 400, path="org/tiny", name="x" * 97)
    assert "string" in refusal(api, 400, path=["org"])
    assert api.post("/models", {"name": "x"}).json()["error"]["param"] == "path"


def test_a_path_that_is_not_unicode_is_refused(api: Api) -> None:
    answer = api.post("/models", content=b'{"path": "\\ud800"}', headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "path")


def test_a_loop_of_links_in_a_model_is_refused(api: Api, tmp_path: Path) -> None:
    (tmp_path / "models" / "org" / "tiny" / "original").symlink_to("original")
    assert "cannot be read" in refusal(api, 400, path="org/tiny")


def test_what_lies_deep_in_a_folder_does_not_matter(api: Api, tmp_path: Path) -> None:
    """Deeper than a recursion may go; nothing there is read."""
    deep = tmp_path / "models" / "org" / "tiny" / "runs"
    deep.mkdir()
    at = os.open(deep, os.O_RDONLY)
    for _ in range(3000):
        os.mkdir("d", dir_fd=at)
        inner = os.open("d", os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = inner
    os.close(at)
    try:
        assert api.post("/models", {"path": "org/tiny"}).status_code == 201
    finally:
        subprocess.run(["rm", "-rf", deep], check=True)  # pytest's own way would be too deep a recursion


def test_a_folder_with_only_a_gguf_file_is_sent_to_pull(api: Api, tmp_path: Path) -> None:
    (tmp_path / "models" / "org" / "raw").mkdir()
    (tmp_path / "models" / "org" / "raw" / "model.gguf").write_bytes(b"GGUF")
    assert "run `tuneserve pull`" in refusal(api, 400, path="org/raw")


def test_an_unsupported_family_is_refused_with_those_that_are(api: Api, tmp_path: Path) -> None:
    config = tmp_path / "models" / "org" / "tiny" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "gpt_neox"}))
    message = refusal(api, 400, path="org/tiny")
    assert all(name in message for name in ("gpt_neox", *SUPPORTED_FAMILIES))
    assert str(tmp_path) not in message


def test_a_tokenizer_and_a_template_that_do_not_fit_are_refused(api: Api, tmp_path: Path) -> None:
    folder = tmp_path / "models" / "org" / "tiny"
    (folder / "chat_template.jinja").write_text("{% if")
    assert "not valid Jinja" in refusal(api, 400, path="org/tiny")
    (folder / "chat_template.jinja").unlink()
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 100_000, "content": "<|far|>"})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "vocab_size" in refusal(api, 400, path="org/tiny")


def test_files_without_an_end_are_refused(api: Api, tmp_path: Path) -> None:
    config = tmp_path / "models" / "org" / "tiny" / "config.json"
    config.write_text('{"a":' * 100_000)
    assert refusal(api, 400, path="org/tiny")


def test_nothing_takes_a_registration_back(api: Api) -> None:
    assert api.post("/models", {"path": "org/tiny"}).status_code == 201
    for method in ("DELETE", "PUT", "PATCH"):
        for path in ("/models", "/models/tiny", "/v1/models/tiny", "/checkpoints/tiny"):
            assert api.run(api.async_client.request(method, path)).status_code in (404, 405, 409)
    assert known(api) == ["tiny", "base"]


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

"""POST /finetune with a configuration of torchtune. Trainers run in tests/service/test_torchtune_user.py."""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.api import BASE, Api, running_api
from tests.support.json_fuzz import any_text, junk
from trainer.torchtune.components import COMPONENTS

RECORD = {"input": "Who are you?", "output": "I am Tuna."}
CONFIG: dict[str, Any] = {
    "output_dir": "/tmp/elsewhere",
    "device": "cpu",
    "dtype": "fp32",
    "dataset": {
        "_component_": "torchtune.datasets.instruct_dataset",
        "source": "json",
        "data_files": "good.jsonl",
        "split": "train",
    },
    "tokenizer": {"_component_": "torchtune.models.llama3.llama3_tokenizer", "path": "original/tokenizer.model"},
    "checkpointer": {
        "_component_": "torchtune.training.FullModelHFCheckpointer",
        "checkpoint_dir": BASE,
        "model_type": "LLAMA3",
        "output_dir": "${output_dir}",
    },
    "optimizer": {"_component_": "bitsandbytes.optim.PagedAdamW8bit", "lr": 2e-5},
    "epochs": 1,
    "batch_size": 2,
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    (home / "data").mkdir()
    (home / "data" / "good.jsonl").write_text(json.dumps(RECORD))
    (home / "data" / "bad.jsonl").write_text('{"question": "x"}')
    (home / "secret.jsonl").write_text(json.dumps(RECORD))
    return home


@pytest.fixture(scope="module")
def api(home: Path) -> Iterator[Api]:
    with running_api(home) as api:
        yield api


def changed(path: str, value: Any) -> dict[str, Any]:
    config = deepcopy(CONFIG)
    *parents, last = path.split(".")
    group = config
    for parent in parents:
        group = group.setdefault(parent, {})
    group[last] = value
    return config


@pytest.mark.parametrize(
    ("path", "value", "param", "words"),
    [
        ("epoch", 1, "epoch", "did you mean epochs"),
        ("epochs", 0, "epochs", "greater than or equal to 1"),
        ("optimizer.lr", -1, "optimizer.lr", "greater than 0"),
        ("optimizer.betas", [0.9, 1.5], "optimizer.betas.1", "less than 1"),
        ("optimizer._component_", "os.system", "optimizer._component_", "'os.system' is not in the list"),
        ("dataset._component_", "builtins.eval", "dataset._component_", "torchtune.datasets.instruct_dataset"),
        ("model._component_", "subprocess.run", "model._component_", "not in the list"),
        ("model._component_", "torchtune.models.llama3.llama3_8b", "model._component_", "hidden_size is"),
        ("model._component_", "torchtune.models.qwen3.qwen3_0_6b_base", "model._component_", "model_type is 'llama'"),
        ("model._component_", "torchtune.models.llama2.qlora_llama2_7b", "model._component_", "QLoRA"),
        ("dataset.source", "tatsu-lab/alpaca", "dataset.source", "with data_files it is one of"),
        ("dataset.filter_fn", "os.remove", "dataset.filter_fn", "no code"),
        ("dataset.data_files", "../secret.jsonl", "dataset.data_files", "outside of the data folder"),
        ("dataset.data_files", "/etc/passwd", "dataset.data_files", "outside of the data folder"),
        ("dataset.data_files", "bad.jsonl", "dataset.data_files", "record 1"),
        ("dataset.data_files", ["good.jsonl"] * 1001, "dataset.data_files", "at most 1000"),
        ("dataset.data_files", "a\0b", "dataset.data_files", "text is expected"),
        ("dataset.split", "test", "dataset.split", "train only"),
        ("dataset.packed", True, "tokenizer.max_seq_len", "packed data need it"),
        ("checkpointer.checkpoint_dir", "/etc", "checkpointer.checkpoint_dir", "no model of this service"),
        ("checkpointer.checkpoint_dir", "../..", "checkpointer.checkpoint_dir", "no model of this service"),
        ("checkpointer.checkpoint_dir", "x" * 5000, "checkpointer.checkpoint_dir", "no model of this service"),
        ("checkpointer.checkpoint_files", ["none.pt"], "checkpointer.checkpoint_files", "no file 'none.pt' in base"),
        ("checkpointer.checkpoint_files", ["../x"], "checkpointer.checkpoint_files", "no file of checkpoint_dir"),
        ("checkpointer.model_type", "QWEN2", "checkpointer.model_type", "does not fit"),
        ("checkpointer.model_type", "GEMMA", "checkpointer.model_type", "not supported"),
        ("resume_from_checkpoint", True, "resume_from_checkpoint", "/resume; write False"),
        ("shuffle", False, "shuffle", "write True"),
        ("dtype", "fp16", "dtype", "bf16 or fp32"),
        ("seed", "${oc.env:HOME}", "seed", "only names of this file"),
        ("seed", "${seed}", "seed", "circle"),
        ("seed", "${sead}", "seed", "did you mean seed"),
    ],
)
def test_a_mistake_is_named_as_the_request_has_it(api: Api, path: str, value: Any, param: str, words: str) -> None:
    answer = api.post("/finetune", {"config": changed(path, value)})
    assert answer.status_code == 400, answer.text
    refusal = answer.json()["error"]
    assert refusal["param"] == f"config.{param}"
    assert words in refusal["message"]
    assert refusal["message"].startswith(f"config.{param}")
    assert str(api.services.settings.home) not in refusal["message"]
    assert api.get("/finetune").json()["data"] == []


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"config": 7}, "config"),
        ({"config": ": : :"}, "config"),
        ({"config": "a: &x [1]\nb: [*x, *x]"}, "config"),
        ({"config": "!!python/object/apply:os.system ['true']"}, "config"),
        ({"config": "x" * 300_000}, "config"),
        ({"config": {}}, "config.checkpointer"),
        ({"config": CONFIG, "epochs": 1}, "epochs"),
        ({"config": CONFIG, "promote": "best"}, "promote"),
        ({"config": CONFIG, "suffix": "a b"}, "suffix"),
        ({"config": CONFIG, "recipe": "dpo"}, "config.dataset._component_"),
        ({"config": CONFIG, "recipe": "ppo"}, "recipe"),
        ({"config": CONFIG, "recipe": "generate"}, "recipe"),
        ({"config": CONFIG, "dataset": {"data_files": "none.jsonl"}}, "dataset.data_files"),
    ],
)
def test_a_body_that_is_wrong_is_refused(api: Api, body: dict[str, Any], param: str) -> None:
    answer = api.post("/finetune", body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert api.get("/finetune").json()["data"] == []


def test_a_model_that_the_request_names_and_is_not_there_is_a_404(api: Api) -> None:
    answer = api.post("/finetune", {"config": CONFIG, "model": "gpt-4"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, "model")


@pytest.mark.parametrize("kind", ["object", "text"])
def test_a_configuration_becomes_a_job_with_its_notes(home: Path, tmp_path: Path, kind: str) -> None:
    with running_api(tmp_path) as api:
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "good.jsonl").write_text(json.dumps(RECORD))
        config = CONFIG if kind == "object" else yaml.safe_dump(CONFIG)
        answer = api.post("/finetune", {"config": config, "suffix": "tune"})
        assert answer.status_code == 202, answer.text
        job = answer.json()
        assert (job["model"], job["recipe"], job["suffix"]) == (BASE, "full", "tune")
        expected = {
            "learning_rate": 2e-5,
            "weight_decay": 0.01,
            "lr_schedule": "constant",
            "epochs": 1,
            "batch_size": 2,
        }
        assert {key: job["config"][key] for key in expected} == expected
        assert any(
            note.startswith("optimizer: bitsandbytes.optim.PagedAdamW8bit is adamw_8bit") for note in job["notes"]
        )
        assert any(note.startswith("output_dir: not taken over HTTP") for note in job["notes"])
        assert api.get(f"/finetune/{job['id']}").json()["notes"] == job["notes"]
        api.post(f"/finetune/{job['id']}/cancel")


def test_the_request_may_bring_the_records_and_the_model(tmp_path: Path) -> None:
    with running_api(tmp_path) as api:
        config = {"epochs": 2, "device": "cpu"}
        body = {"config": config, "model": BASE, "dataset": {"records": [RECORD]}, "recipe": "lora"}
        answer = api.post("/finetune", body)
        assert answer.status_code == 202, answer.text
        job = answer.json()
        assert (job["recipe"], job["config"]["data_format"], job["config"]["epochs"]) == ("lora", "auto", 2)
        api.post(f"/finetune/{job['id']}/cancel")


names = st.sampled_from([name for place in COMPONENTS.values() for name in [*place][:3]])
values = st.one_of(junk, names, st.sampled_from(["${output_dir}", "${a.b}", "${${", "json", True, None, [], {}]))
keys = st.sampled_from(
    [
        *CONFIG,
        "prompt",
        *(f"{place}.{key}" for place, all_ in COMPONENTS.items() for c in all_.values() for key in c.keys),
    ]
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None)
@given(changes=st.lists(st.tuples(keys | any_text, values), min_size=1, max_size=3))
def test_no_change_of_a_good_configuration_breaks_the_service(api: Api, changes: list[tuple[str, Any]]) -> None:
    config: Any = deepcopy({**CONFIG, "epochs": 0})  # nothing gets as far as a trainer
    for path, value in changes:
        if path == "epochs":
            continue
        *parents, last = path.split(".")
        group = config
        for parent in parents:
            group = group.get(parent) if isinstance(group, dict) else None
        if isinstance(group, dict):
            group[last] = value
    body = json.dumps({"config": config}).encode()
    answer = api.post("/finetune", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]
    assert len(answer.content) < 20_000


@settings(max_examples=150, deadline=None, database=None)
@given(text=st.one_of(st.text(max_size=200), st.text(alphabet="ab:-[]{}&*!?|>'\"#$ \n0.~<", max_size=60)))
def test_no_text_breaks_the_service(api: Api, text: str) -> None:
    answer = api.post("/finetune", {"config": text})
    assert answer.status_code == 400, answer.text

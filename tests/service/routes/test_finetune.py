"""What POST /finetune refuses, and that a refusal leaves nothing behind. Trainers run in test_finetune_loop.py."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.schemas.datasets import MAX_INLINE_RECORDS
from tests.support.api import BASE, Api, running_api

RECORD = {"input": "Who are you?", "output": "I am Tuna."}
ALPACA = {"instruction": "Greet.", "input": "", "output": "Hello."}
SHAREGPT_ALIEN = {"conversations": [{"from": "alien", "value": "a"}, {"from": "gpt", "value": "b"}]}
PAIR = {"prompt": "Who are you?", "chosen": "I am Tuna.", "rejected": "I am a model."}
DATASET = {"records": [RECORD]}
BODY: dict[str, Any] = {"model": BASE, "dataset": DATASET}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With data inside and outside of the data folder."""
    home = tmp_path_factory.mktemp("home")
    data = home / "data"
    (data / "folder").mkdir(parents=True)
    (data / "good.jsonl").write_text(json.dumps(RECORD))
    (data / "broken.jsonl").write_text(json.dumps(RECORD) + '\n{"input": "a", \n')
    (data / "columns.json").write_text(json.dumps([RECORD, {"question": "x"}]))
    (data / "bad.csv").write_text('input,output\n"a\nb",c\nd,e,f\n')
    (data / "bad.parquet").write_bytes(b"PAR1 and no more")
    (data / "empty.jsonl").write_text("\n")
    (home / "secret.jsonl").write_text(json.dumps(RECORD))
    (data / "link.jsonl").symlink_to(home / "secret.jsonl")
    (data / "way_out").symlink_to(home)
    (data / "loop").symlink_to(data / "loop")
    (home / "models" / "alien").mkdir(parents=True)
    (home / "models" / "alien" / "config.json").write_text('{"model_type": "mamba"}')
    return home


@pytest.fixture(scope="module")
def api(home: Path) -> Iterator[Api]:
    with running_api(home) as api:
        yield api


def error(api: Api, body: Any, status: int = 400, **options: Any) -> dict[str, Any]:
    """Send `body`; its refusal, after a look at what it left behind."""
    answer = api.post("/finetune", body, **options)
    assert answer.status_code == status, answer.text
    assert api.get("/finetune").json()["data"] == []
    assert not [*api.services.settings.runs_dir.glob("*")]
    refusal: dict[str, Any] = answer.json()["error"]
    assert refusal["type"] == "invalid_request_error"
    return refusal


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"epoch": 1}, "epoch", "unknown field"),
        ({"recipe": "ppo"}, "recipe", "'full', 'lora' or 'dpo'"),
        ({"learning_rate": -1e-4}, "learning_rate", "greater than 0 (got -0.0001)"),
        ({"learning_rate": "1e-4"}, "learning_rate", "valid number"),
        ({"epochs": 0}, "epochs", "greater than or equal to 1"),
        ({"epochs": True}, "epochs", "valid integer"),
        ({"batch_size": 1.5}, "batch_size", "valid integer"),
        ({"lora": {"rank": 0}}, "lora.rank", "greater than or equal to 1"),
        ({"lora": {"target_modules": ["conv"]}}, "lora", "unknown target_modules"),
        ({"device": "tpu"}, "device", "tpu"),
        ({"seed": 2**31}, "seed", "less than"),
        ({"suffix": "my bot"}, "suffix", "my bot"),
        ({"suffix": ""}, "suffix", "pattern"),
        ({"suffix": "x" * 65}, "suffix", "pattern"),
        ({"promote": "always"}, "promote", "'manual'"),
        ({"promote": "best"}, "promote", "validation_split above 0"),
        ({"model": 7}, "model", "valid string"),
        ({"model": None}, "model", "valid string"),
        ({"model": "alien"}, "model", "mamba"),
        ({"dataset": []}, "dataset", "at least 1"),
        ({"dataset": {}}, "dataset", "none is given"),
        ({"dataset": DATASET | {"file_id": "file-1"}}, "dataset", "records and file_id is given"),
        ({"dataset": DATASET | {"source": "json"}}, "dataset", "source belongs to data_files"),
        ({"dataset": DATASET | {"splits": "train"}}, "dataset.splits", "did you mean split?"),
        ({"dataset": DATASET | {"split": "train[:"}}, "dataset.split", "not a split"),
        ({"dataset": DATASET | {"weight": 0}}, "dataset.weight", "greater than 0"),
        ({"dataset": DATASET | {"hub_id": "a/b"}}, "dataset", "records and hub_id is given"),
        ({"dataset": DATASET | {"hub_config": "en"}}, "dataset", "hub_config belongs to hub_id"),
        ({"dataset": {"hub_id": "../b c"}}, "dataset.hub_id", "pattern"),
        ({"dataset": [DATASET, {"records": [{"input": 1}]}]}, "dataset.1.records.0", "dataset.1.records, record 1"),
        ({"dataset": [DATASET, {"data_files": "none.jsonl"}]}, "dataset.1.data_files", "no file 'none.jsonl'"),
        ({"dataset": [DATASET, {"sources": "x"}]}, "dataset.1.sources", "did you mean source?"),
        ({"dataset": [DATASET] * 65}, "dataset", "at most 64"),
        ({"validation": {"records": [{"input": "a"}]}}, "validation.records.0", "validation.records, record 1"),
        ({"validation": DATASET, "validation_split": 0.1}, None, "say two things"),
        ({"validation": DATASET | {"weight": 2}}, "validation", "weight is for datasets that are trained on"),
        ({"recipe": "dpo"}, "dataset.records.0", "record 1: the recipe dpo learns from preferences"),
        ({"dataset": {"records": [RECORD, PAIR]}}, "dataset.records.1", "only the recipe dpo learns"),
        ({"merge_start": True}, "merge_start", "base is no adapter"),
        ({"priority": 101}, "priority", "less than or equal to 100"),
        ({"metadata": {"a": 1}}, "metadata.a", "valid string"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata", "at most 16"),
        ({"webhook": {"url": "ftp://a"}}, "webhook.url", "pattern"),
        ({"dataset": {"records": []}}, "dataset.records", "no records"),
        ({"dataset": {"records": {"input": "a"}}}, "dataset.records", "valid list"),
        ({"dataset": {"records": [RECORD, {"input": "a"}]}}, "dataset.records.1", "record 2"),
        ({"dataset": {"records": [RECORD, RECORD, "text"]}}, "dataset.records.2", "record 3"),
        ({"dataset": {"records": [{"messages": []}]}}, "dataset.records.0", "at least one message"),
        ({"dataset": {"records": [{"input": 1, "output": "b"}]}}, "dataset.records.0", "must be a string"),
        ({"dataset": {"records": [RECORD] * (MAX_INLINE_RECORDS + 1)}}, "dataset.records", "10000"),
        ({"dataset": {"data_files": []}}, "dataset.data_files", "at least 1"),
        ({"dataset": {"data_files": "good.jsonl", "source": "xml"}}, "dataset.source", "'parquet'"),
        ({"dataset": {"data_files": "good.jsonl", "source": "csv"}}, "dataset.data_files", "no records"),
        ({"dataset": DATASET, "source": "csv"}, None, "source belongs to data_files"),
        ({"dataset": {"data_files": "good.jsonl", "source": "csv"}, "source": "json"}, None, "differ"),
        ({"dataset": {"data_files": "bad.csv"}}, "dataset.data_files", "record 2 (line 4): 3 fields"),
        ({"dataset": {"data_files": "bad.parquet"}}, "dataset.data_files", "cannot be read as Parquet"),
        ({"dataset": {"records": [ALPACA, ALPACA | {"output": 1}]}}, "dataset.records.1", '"output" must be'),
        ({"dataset": {"records": [SHAREGPT_ALIEN]}}, "dataset.records.0", "conversations[0].from must be one of"),
        ({"data_format": "alpaca"}, "dataset.records.0", 'needs the columns "instruction", "output"'),
        ({"column_map": {"input": "q"}}, "dataset.records.0", '"q" is missing, found "input", "output"'),
        ({"column_map": {"question": "q"}}, "column_map", "unknown column 'question'"),
        ({"data_format": "xml"}, "data_format", "'sharegpt'"),
        ({"split": "train[:10"}, "split", "not a split"),
        ({"packed": 1}, "packed", "valid boolean"),
        ({"lr_schedule": "step"}, "lr_schedule", "'constant'"),
        ({"warmup_steps": -1}, "warmup_steps", "greater than or equal to 0"),
        ({"dataset": {"data_files": "broken.jsonl"}}, "dataset.data_files", "record 2 (line 2, column"),
        ({"dataset": {"data_files": "columns.json"}}, "dataset.data_files", "columns.json, record 2"),
        ({"dataset": {"data_files": ["good.jsonl", "empty.jsonl"]}}, "dataset.data_files", "empty.jsonl holds no"),
        ({"dataset": {"data_files": "none.jsonl"}}, "dataset.data_files", "no file 'none.jsonl'"),
        ({"dataset": {"data_files": "folder"}}, "dataset.data_files", "no file 'folder'"),
        ({"dataset": {"data_files": ""}}, "dataset.data_files", "no file ''"),
        ({"dataset": {"data_files": "../secret.jsonl"}}, "dataset.data_files", "outside of the data folder"),
        ({"dataset": {"data_files": "folder/../good.jsonl"}}, "dataset.data_files", "outside of the data folder"),
        ({"dataset": {"data_files": "/etc/passwd"}}, "dataset.data_files", "outside of the data folder"),
        ({"dataset": {"data_files": "link.jsonl"}}, "dataset.data_files", "outside of the data folder"),
        ({"dataset": {"data_files": "way_out/secret.jsonl"}}, "dataset.data_files", "outside of the data folder"),
        ({"dataset": {"data_files": "way_out/none"}}, "dataset.data_files", "outside of the data folder"),
        ({"dataset": {"data_files": "loop"}}, "dataset.data_files", "loop"),
        ({"dataset": {"data_files": "a\0b"}}, "dataset.data_files", "not a path"),
        ({"dataset": {"data_files": "x" * 5000}}, "dataset.data_files", "not a path"),
    ],
)
def test_a_mistake_is_named_with_its_field_and_leaves_nothing(
    api: Api, change: dict[str, Any], param: str | None, words: str
) -> None:
    refusal = error(api, BODY | change)
    assert words in refusal["message"]
    assert refusal["param"] == param


@pytest.mark.parametrize("missing", ["model", "dataset"])
def test_both_required_fields_are_asked_for(api: Api, missing: str) -> None:
    refusal = error(api, {key: value for key, value in BODY.items() if key != missing})
    assert (refusal["param"], refusal["message"]) == (missing, f"{missing}: this field is required")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "not valid JSON"),
        (b"[]", "JSON object"),
        (b'{"model": "base", "dataset": {"records": [{"input": "\\ud800", "output": "b"}]}}', "surrogate"),
        (b'{"model": "base", "dataset": {"data_files": "\\ud800"}}', "dataset.data_files"),
        (b'{"model": "base", "learning_rate": NaN, "dataset": {"file_id": "x"}}', "learning_rate"),
        (b'{"model": "base", "seed": 1' + b"0" * 5000 + b"}", ""),
        (b'{"a":' * 100_000, ""),
    ],
)
def test_a_body_that_is_no_such_object_is_refused(api: Api, content: bytes, words: str) -> None:
    refusal = error(api, None, content=content, headers={"Content-Type": "application/json"})
    assert words in refusal["message"]


def test_a_model_that_is_not_there_is_a_404_with_those_that_are(api: Api) -> None:
    for name in ("gpt-4", "../models/base", ""):
        refusal = error(api, BODY | {"model": name}, status=404)
        assert (refusal["param"], refusal["code"]) == ("model", "model_not_found")
        assert "alien, base" in refusal["message"]
    assert "known are base, alien" in error(api, BODY | {"model": "ft:base:x::12345678"}, status=404)["message"]


def test_an_uploaded_file_that_is_not_there_is_a_404(api: Api) -> None:
    refusal = error(api, BODY | {"dataset": {"file_id": "file-none"}}, status=404)
    assert (refusal["param"], refusal["code"]) == ("dataset.file_id", None)


def test_a_file_of_another_purpose_is_not_trained_on(api: Api) -> None:
    upload = api.post("/v1/files", files={"file": ("a.txt", b"hello")}, data={"purpose": "user_data"})
    refusal = error(api, BODY | {"dataset": {"file_id": upload.json()["id"]}})
    assert "user_data" in refusal["message"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("get", "/finetune/ftjob-none"),
        ("get", "/finetune/ftjob-none/events"),
        ("get", "/finetune/ftjob-none/events?stream=true"),
        ("get", "/finetune/ftjob-none/metrics"),
        ("get", "/finetune/ftjob-none/logs"),
        ("post", "/finetune/ftjob-none/cancel"),
        ("get", "/finetune?after=ftjob-none"),
    ],
)
def test_an_unknown_job_is_a_404(api: Api, method: str, path: str) -> None:
    answer = api.get(path) if method == "get" else api.post(path)
    assert answer.status_code == 404
    assert "ftjob-none" in answer.json()["error"]["message"]


@pytest.mark.parametrize("query", ["limit=0", "limit=1000000", "limit=x"])
def test_pages_are_bounded(api: Api, query: str) -> None:
    assert api.get(f"/finetune?{query}").status_code == 400
    assert api.get(f"/v1/files?{query}").status_code == 400

"""A dry run beside the run itself."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.jobs.trainer_process import trainer_environment
from tests.support.runs import RECORDS
from tests.support.tiny import make_tiny_model
from trainer import dry_run
from trainer.config import RunConfig
from trainer.data.counting import count_records
from trainer.option_groups import DatasetConfig
from trainer.run_folder import RunFolder

PAIR = {"prompt": "Who are you?", "chosen": "I am Tuna.", "rejected": "I am a model."}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny", "llama")


def write_lines(path: Path, records: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def prepared(folder: Path, model: Path, records: Iterable[Any], **options: Any) -> RunFolder:
    data = write_lines(folder / "records.jsonl", records)
    config = RunConfig(model=str(model), data_files=(str(data),), device="cpu", dtype="fp32", **options)
    run = RunFolder(folder)
    run.config.write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
    return run


def parts(run: RunFolder) -> dict[str, dict[str, Any]]:
    told = io.StringIO()
    dry_run.report(run, told)
    return {part.pop("part"): part for part in map(json.loads, told.getvalue().splitlines())}


def test_all_records_of_a_small_set_are_looked_at(tmp_path: Path, model: Path) -> None:
    found = parts(prepared(tmp_path, model, RECORDS, epochs=2, batch_size=4, save_every_n_steps=3))
    data, steps = found["data"], found["steps"]
    assert (data["total_records"], data["is_sampled"]) == (len(RECORDS), False)
    assert data["report"]["records"] == len(RECORDS)
    assert data["report"]["trained_tokens"] > 0
    assert any(segment["trained"] for segment in data["examples"][0]["segments"])
    per_epoch = -(-len(RECORDS) // 4)
    assert (steps["steps_per_epoch"], steps["epochs"]) == (per_epoch, 2)
    assert (steps["total_steps"], steps["checkpoints"]) == (2 * per_epoch, -(-2 * per_epoch // 3))
    assert 0 <= steps["padding"] < 1
    assert found["speed"]["seconds_per_step"] > 0
    assert found["speed"]["memory_total_bytes"] > found["speed"]["memory_free_bytes"] > 0


def test_of_a_large_set_a_sample_is_looked_at_and_the_rest_counted(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dry_run, "SAMPLE", 8)
    found = parts(prepared(tmp_path, model, RECORDS * 10, epochs=1, batch_size=1))
    assert found["data"]["is_sampled"]
    assert found["data"]["report"]["records"] == 8
    assert found["data"]["total_records"] == found["steps"]["total_steps"] == 10 * len(RECORDS)


@pytest.mark.parametrize(
    "options",
    [{"recipe": "full"}, {"recipe": "dpo"}, {"packed": True, "max_seq_len": 64}],
    ids=["full", "dpo", "packed"],
)
def test_every_recipe_is_measured(tmp_path: Path, model: Path, options: dict[str, Any]) -> None:
    records = [PAIR] * 4 if options.get("recipe") == "dpo" else RECORDS
    found = parts(prepared(tmp_path, model, records, **options))
    assert "problem" not in found["speed"]
    assert found["steps"]["longest_row"] <= 1024


def test_the_process_answers_with_a_mistake_in_the_data(tmp_path: Path, model: Path) -> None:
    run = prepared(tmp_path, model, [{"input": "a", "output": "b"}, {"input": "a"}])
    command = [sys.executable, "-m", "trainer.dry_run", str(run.path)]
    done = subprocess.run(command, capture_output=True, text=True, env=trainer_environment(), check=True)
    (answer,) = map(json.loads, done.stdout.splitlines())
    assert answer["part"] == "error"
    assert "record 2 (line 2)" in answer["message"]


@pytest.mark.parametrize(
    ("name", "content", "split", "count"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": "b"}\n{"text": "c"}', "train", 3),
        ("a.jsonl", '{"text": "a"}\n{"text": "b"}\n{"text": "c"}\n', "train[:2]", 2),
        ("a.json", '[{"text": "a"},\n\n {"text": "b"}]', "train", 2),
        ("a.csv", "text\na\nb\nc\nd\n", "train[-25%:]", 1),
        ("a.txt", "a\nb\n", "train", 2),
    ],
)
def test_records_are_counted(tmp_path: Path, name: str, content: str, split: str, count: int) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    options = RunConfig(model="-", data_files=("-",))
    assert count_records(options, DatasetConfig(data_files=(str(tmp_path / name),), split=split)) == count

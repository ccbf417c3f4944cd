"""Data sets of the hub, from the cache of the `datasets` library: there is no network here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from lm.errors import UserError
from tests.support.runs import make_run
from trainer.config import load_run_config
from trainer.data.errors import DataError
from trainer.data.hub_source import HubDataset
from trainer.data.options import ReadOptions
from trainer.data.records import to_record
from trainer.option_groups import DatasetConfig
from trainer.prepare import RunData, prepare_data
from trainer.progress import Progress

TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"properties": {name: {"type": "string"}}}}}
    for name in ("city", "day")
]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"Question {number}"},
            {"role": "assistant", "content": "Answer.", "weight": number % 2},
        ],
        "tools": TOOLS[number % 2 :][:1],
    }
    for number in range(6)
]


@pytest.fixture(scope="module")
def hub_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache as it is after `acme/chats` was loaded, with two splits of CHATS."""
    folder = tmp_path_factory.mktemp("hub")
    (folder / "source").mkdir()
    for name, records in (("train", CHATS), ("test", CHATS[:3])):
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"source/{name}.jsonl").write_text(text, encoding="utf-8")
    datasets.disable_progress_bars()
    cache = folder / "cache"
    datasets.load_dataset(str(folder / "source"), cache_dir=str(cache))
    (cache / "source").rename(cache / "acme___chats")
    for path in cache.rglob("source-*.arrow"):
        path.rename(path.with_name(path.name.replace("source-", "chats-")))
    return cache


@pytest.fixture(autouse=True)
def offline(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(hub_cache))


def prepare(folder: Path, model: Path, **options: Any) -> RunData:
    run = make_run(folder, model, **options)
    (folder / "data.json").unlink()
    config = load_run_config(run.config)
    with Progress(run) as progress:
        return prepare_data(config, max_seq_len=1024, folder=run, progress=progress, check_cancelled=lambda: None)


def test_rows_are_read_as_their_file_has_them() -> None:
    rows = HubDataset("acme/chats", None, "train")
    values = list(rows.values())
    assert [place for place, _ in values] == [f"row {number}" for number in range(1, 7)]
    assert [value for _, value in values] == CHATS  # no nulls in the schemas of tools, which Arrow puts there
    record = to_record(values[0][1], "here", options=ReadOptions())
    assert record.tools == TOOLS[:1]


def test_a_run_trains_on_a_data_set_of_the_hub_and_a_split_of_it(tiny_llama: Path, tmp_path: Path) -> None:
    chats = {"hub_id": "acme/chats", "column_map": {"tools": "none"}}
    options: dict[str, Any] = {
        "data_files": None,
        "datasets": [{**chats, "split": "train[:-1]"}],
        "validation": {**chats, "split": "test"},
    }
    data = prepare(tmp_path / "run", tiny_llama, **options)
    assert (len(data.training), len(data.validation), data.report["skipped"]) == (2, 1, 5)
    assert prepare(tmp_path / "again", tiny_llama, **options).fingerprint == data.fingerprint
    options["datasets"] = [{**chats, "split": "train[1:]"}]
    other = prepare(tmp_path / "other", tiny_llama, **options)
    assert other.fingerprint != data.fingerprint
    assert len(other.training) == 3


def test_what_is_not_there_is_named_with_its_mend(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"hub_id: cannot load 'acme/none'.*check the id.*network") as caught:
        prepare(tmp_path / "run", tiny_llama, data_files=None, datasets=[{"hub_id": "acme/none"}])
    assert caught.value.param == "hub_id"
    with pytest.raises(DataError, match=r"hub_id: cannot load 'acme/chats'.*nosplit"):
        HubDataset("acme/chats", None, "nosplit")


def test_a_folder_here_is_not_taken_for_an_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "acme/secret").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for hub_id in ("acme/secret", ".."):
        with pytest.raises(DataError, match="is a file or folder here"):
            HubDataset(DatasetConfig(hub_id=hub_id).hub_id or "", None, "train")


def test_only_a_data_set_of_the_hub_has_other_splits() -> None:
    assert DatasetConfig(hub_id="acme/chats", split="test_sft[:10%]").split == "test_sft[:10%]"
    for text in ("[:10]", ""):
        with pytest.raises(ValueError, match="names no split"):
            DatasetConfig(hub_id="acme/chats", split=text)
    with pytest.raises(ValueError, match="files of data have the split train only"):
        DatasetConfig(data_files=("a.json",), split="test")

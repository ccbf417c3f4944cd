"""From the options of a run to what it goes over."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from lm.errors import UserError
from lm.tokenizer import load_tokenizer
from tests.support.runs import RECORDS, losses, make_run, train_here
from trainer.config import load_run_config
from trainer.prepare import RunData, prepare_data
from trainer.progress import Progress
from trainer.run_folder import RunFolder


def prepare(run: RunFolder) -> RunData:
    config = load_run_config(run.config)
    with Progress(run) as progress:
        return prepare_data(
            config, max_seq_len=config.max_seq_len, folder=run, progress=progress, check_cancelled=lambda: None
        )


def test_a_slice_is_taken_over_all_files_in_their_order(tiny_llama: Path, tmp_path: Path) -> None:
    files = [tmp_path / "first.json", tmp_path / "second.json"]
    for file, records in zip(files, (RECORDS[:10], RECORDS[10:]), strict=True):
        file.write_text(json.dumps(records), encoding="utf-8")
    names = [str(file) for file in files]
    whole = prepare(make_run(tmp_path / "whole", tiny_llama, data_files=names))
    part = prepare(make_run(tmp_path / "part", tiny_llama, data_files=names, split="train[8:-2]"))
    assert len(whole.training) == 16
    assert list(part.training) == whole.training[8:14]


def test_forms_may_differ_from_record_to_record_and_are_counted(
    tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records: list[dict[str, Any]] = [*RECORDS[:2], {"text": "a line"}, {"instruction": "a", "output": "b"}]
    with caplog.at_level(logging.INFO):
        assert len(prepare(make_run(tmp_path / "run", tiny_llama, records=records)).training) == 4
    assert "Data files: 1 of json." in caplog.messages
    assert "Data: 2 records of instruct, 1 records of text, 1 records of alpaca, by their columns." in caplog.messages


def test_packed_rows_are_as_full_whatever_their_weight(
    tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told = []
    for weight in (1.0, 4.0):
        sets = [{"data_files": [str(tmp_path / f"{weight}" / "data.json")], "weight": weight}]
        options: dict[str, Any] = {"data_files": None, "datasets": sets, "packed": True, "max_seq_len": 128}
        caplog.clear()
        with caplog.at_level(logging.INFO):
            prepare(make_run(tmp_path / f"{weight}", tiny_llama, **options))
        told += [message.split("rows, ")[1] for message in caplog.messages if message.startswith("Packed")]
    assert told[0] == told[1]


def test_a_tokenizer_file_is_trained_with_and_goes_into_the_checkpoint(tiny_llama: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    (base / "tokenizer.json").rename(tmp_path / "mine.json")
    ours = make_run(tmp_path / "ours", base, max_steps=2, tokenizer_file=str(tmp_path / "mine.json"), recipe="full")
    theirs = make_run(tmp_path / "theirs", tiny_llama, max_steps=2, recipe="full")
    for run in (ours, theirs):
        train_here(run)
    assert losses(ours) == losses(theirs)
    published = load_tokenizer(ours.checkpoints / "step_2")
    assert published.encode("Who are you?") == load_tokenizer(tiny_llama).encode("Who are you?")


def test_a_tokenizer_file_that_is_missing_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.json") as caught:
        prepare(make_run(tmp_path / "run", tiny_llama, tokenizer_file=str(tmp_path / "none.json")))
    assert caught.value.param == "tokenizer_file"

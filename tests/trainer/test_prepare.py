"""From the options of a run to what it goes over."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from lm.errors import UserError
from tests.support.runs import RECORDS, events, losses, make_run, train_here
from trainer.config import load_run_config
from trainer.prepare import RunData, prepare_data
from trainer.progress import Progress
from trainer.run_folder import RunFolder


def prepare(run: RunFolder) -> RunData:
    config = load_run_config(run.config)
    with Progress(run) as progress:
        return prepare_data(config, max_seq_len=config.max_seq_len, progress=progress, check_cancelled=lambda: None)


def test_a_slice_is_taken_over_all_files_in_their_order(tiny_llama: Path, tmp_path: Path) -> None:
    files = []
    for number, part in enumerate((RECORDS[:10], RECORDS[10:])):
        files.append(str(tmp_path / f"{number}.json"))
        Path(files[-1]).write_text(json.dumps(part), encoding="utf-8")
    whole = prepare(make_run(tmp_path / "whole", tiny_llama, data_files=files)).rows
    part = prepare(make_run(tmp_path / "part", tiny_llama, data_files=files, split="train[8:-2]")).rows
    assert len(whole) == 16
    assert part == whole[8:14]


def test_forms_may_differ_from_record_to_record_and_are_counted(
    tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records: list[dict[str, Any]] = [*RECORDS[:2], {"text": "a line"}, {"instruction": "a", "output": "b"}]
    with caplog.at_level(logging.INFO):
        assert len(prepare(make_run(tmp_path / "run", tiny_llama, records=records)).rows) == 4
    assert "Data: 2 records of instruct, 1 records of text, 1 records of alpaca, by their columns." in caplog.messages


def test_an_own_tokenizer_file_is_used_and_said_to_be_no_part_of_the_checkpoint(
    tiny_llama: Path, tmp_path: Path
) -> None:
    shutil.copy(tiny_llama / "tokenizer.json", tmp_path / "mine.json")
    runs = [
        make_run(tmp_path / name, tiny_llama, max_steps=2, **options)
        for name, options in (
            ("default", {}),
            ("inside", {"tokenizer_file": str(tiny_llama / "tokenizer.json")}),
            ("outside", {"tokenizer_file": str(tmp_path / "mine.json")}),
        )
    ]
    for run in runs:
        train_here(run)
    assert losses(runs[0]) == losses(runs[1]) == losses(runs[2])
    assert [len(events(run, "warning")) for run in runs] == [0, 0, 1]
    assert "mine.json is not of the model" in events(runs[2], "warning")[0]["message"]


def test_a_tokenizer_file_that_is_missing_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.json") as caught:
        prepare(make_run(tmp_path / "run", tiny_llama, tokenizer_file=str(tmp_path / "none.json")))
    assert caught.value.param == "tokenizer_file"

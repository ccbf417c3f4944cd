from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from service.jobs.job import Job, Progress
from service.jobs.policy import cause_of_death, may_collide, next_step, outcome, queue_position, run_config, startable
from service.registry import Entry, Kind
from trainer.config import TrainingOptions
from trainer.option_groups import DatasetConfig
from trainer.run_folder import RunResult, RunStatus


def job(number: int, device: str = "cpu", **fields: Any) -> Job:
    columns: dict[str, Any] = {
        "id": f"ftjob-{number}",
        "status": "queued",
        "model": "tiny",
        "options": TrainingOptions(device=device),
        "data_files": (),
        "file_id": None,
        "suffix": "",
        "promote": "final",
        "created_at": float(number),
        "started_at": None,
        "finished_at": None,
        "attempt": 1,
        "pid": None,
        "events_offset": 0,
        "cancel_requested": False,
        "progress": Progress(),
        "error": None,
        "fine_tuned_model": None,
    }
    return Job(**columns | fields)


@pytest.mark.parametrize(
    ("first", "second", "collide"),
    [
        ("cpu", "cpu", True),
        ("npu", "npu:0", True),
        ("npu:0", "npu:1", False),
        ("cuda", "npu", False),
        ("auto", "cpu", True),
        ("cuda:3", "auto", True),
    ],
)
def test_devices_collide_when_they_may_be_the_same(first: str, second: str, collide: bool) -> None:
    assert may_collide(first, second) is collide
    assert may_collide(second, first) is collide


def test_one_job_at_a_time_on_a_device_first_come_first_served() -> None:
    queue = [job(1, "npu:0"), job(2, "npu:0"), job(3, "npu:1")]
    assert startable(queue, []) == [queue[0], queue[2]]
    assert startable(queue, [job(0, "npu:1")]) == [queue[0]]


def test_a_job_that_needs_any_device_is_not_overtaken_for_ever() -> None:
    queue = [job(1, "auto"), job(2, "npu:1")]
    assert startable(queue, [job(0, "npu:0")]) == []


def test_positions_count_the_jobs_before_it_that_are_in_the_way() -> None:
    queue = [job(1, "npu:0"), job(2, "npu:1"), job(3, "npu:0")]
    assert [queue_position(waiting, queue) for waiting in queue] == [1, 1, 2]
    assert queue_position(job(4, "npu:0", paused=True), queue) is None


def test_a_result_decides_and_its_failure_keeps_the_last_lines_of_the_log() -> None:
    result = RunResult(status="failed", error_code="non_finite_loss", error_message="loss is nan", error_param="lr")
    status, error = outcome(result, exit_code=1, cancel_requested=False, log_tail="step 3: nan")
    assert status == "failed"
    assert error is not None
    assert (error.code, error.message, error.param, error.log_tail) == (
        "non_finite_loss",
        "loss is nan",
        "lr",
        "step 3: nan",
    )
    succeeded = outcome(RunResult(status="succeeded"), exit_code=0, cancel_requested=False, log_tail="")
    assert succeeded == ("succeeded", None)


@pytest.mark.parametrize(
    ("exit_code", "words"),
    [(-9, "SIGKILL, possibly for lack of memory"), (-11, "SIGSEGV"), (3, "exit code 3"), (None, "unknown")],
)
def test_a_death_without_result_is_told_by_its_cause(exit_code: int | None, words: str) -> None:
    status, error = outcome(None, exit_code=exit_code, cancel_requested=False, log_tail="last words")
    assert status == "failed"
    assert error is not None
    assert error.code == "trainer_died"
    assert words in error.message == cause_of_death(exit_code)
    assert error.log_tail == "last words"


@pytest.mark.parametrize("result", [None, RunResult(status="cancelled"), RunResult(status="succeeded")])
def test_an_accepted_cancel_wins_over_whatever_the_trainer_did(result: RunResult | None) -> None:
    assert outcome(result, exit_code=-9, cancel_requested=True, log_tail="") == ("cancelled", None)


@pytest.mark.parametrize(
    ("status", "exit_code", "fields", "service_left", "expected"),
    [
        ("succeeded", 0, {}, False, "end"),
        ("failed", 1, {}, True, "end"),
        ("cancelled", 0, {}, False, "end"),
        (None, -9, {}, False, "end"),
        # a pause that was asked for
        ("paused", 0, {"pause_requested": True}, False, "pause"),
        ("succeeded", 0, {"pause_requested": True}, False, "end"),
        (None, -10, {"pause_requested": True}, False, "pause"),  # before it listened
        (None, None, {"pause_requested": True}, True, "pause"),
        (None, -11, {"pause_requested": True}, False, "end"),
        ("paused", 0, {}, False, "go on"),  # and taken back meanwhile
        # a stop of the service
        ("paused", 0, {}, True, "go on"),
        ("cancelled", 0, {}, True, "go on"),  # by a signal for the whole group
        (None, -10, {}, True, "go on"),
        (None, -9, {}, True, "go on after a death"),
        (None, None, {}, True, "go on after a death"),
        # a cancel wins over everything
        ("paused", 0, {"cancel_requested": True, "pause_requested": True}, False, "end"),
        (None, None, {"cancel_requested": True}, True, "end"),
    ],
)
def test_what_becomes_of_a_job_whose_trainer_has_ended(
    status: RunStatus | None, exit_code: int | None, fields: dict[str, Any], service_left: bool, expected: str
) -> None:
    result = None if status is None else RunResult(status=status)
    assert next_step(job(1, **fields), result, exit_code=exit_code, service_left=service_left) == expected


def entry(kind: Kind, base: Path, adapter: Path | None = None) -> Entry:
    nothing: dict[str, Any] = dict.fromkeys(
        ("epoch", "train_loss", "validation_loss", "token_accuracy", "validation_token_accuracy")
    )
    return Entry(
        id="ft:x",
        seq=1,
        base="tiny",
        job_id="ftjob-0",
        step=1,
        created_at=0.0,
        best=False,
        **nothing,
        kind=kind,
        base_dir=base,
        adapter_dir=adapter,
    )


HOME = Path("/home/x")
BASE = HOME / "models" / "tiny"


def test_the_trainer_is_told_of_files_as_whole_paths() -> None:
    config = run_config(job(1, data_files=("data/a.jsonl",)), base=BASE, home=HOME)
    assert (config.model, config.model_name) == (str(BASE), "tiny")
    assert config.data_files == ("/home/x/data/a.jsonl",)
    sets = (DatasetConfig(data_files=("data/a.jsonl",), split="train[:5]"), DatasetConfig(hub_id="a/b", weight=2.0))
    held_out = DatasetConfig(data_files=("files/file-1",))
    config = run_config(job(1, datasets=sets, validation=held_out), base=BASE, home=HOME)
    assert config.datasets is not None
    assert config.data_files is None
    assert [each.data_files for each in config.datasets] == [("/home/x/data/a.jsonl",), None]
    assert [each.split for each in config.datasets] == ["train[:5]", None]
    assert config.validation is not None
    assert config.validation.data_files == ("/home/x/files/file-1",)


@pytest.mark.parametrize(
    ("start", "merge", "model", "adapter", "merged"),
    [
        (None, False, BASE, None, False),
        (entry("base", BASE), False, BASE, None, False),
        (entry("full", HOME / "full"), False, HOME / "full", None, False),
        (entry("full", HOME / "full"), True, HOME / "full", None, False),
        (entry("adapter", BASE, HOME / "adapter"), False, BASE, HOME / "adapter", False),
        (entry("adapter", HOME / "full", HOME / "adapter"), True, HOME / "full", HOME / "adapter", True),
    ],
)
def test_a_start_is_the_model_or_an_adapter_on_it(
    start: Entry | None, merge: bool, model: Path, adapter: Path | None, merged: bool
) -> None:
    told = job(1, data_files=("data/a.jsonl",), merge_start=merge)
    config = run_config(told, base=BASE, home=HOME, start=start)
    assert config.model == str(model)
    assert config.start_adapter == (None if adapter is None else str(adapter))
    assert config.merge_start is merged
    assert config.model_name == ("ft:x" if start is not None and start.kind == "full" else "tiny")

from __future__ import annotations

import pytest

from service.jobs.job import Job, Progress
from service.jobs.policy import cause_of_death, may_collide, outcome, queue_position, startable
from trainer.config import TrainingOptions
from trainer.run_folder import RunResult


def job(number: int, device: str) -> Job:
    return Job(
        id=f"ftjob-{number}",
        status="queued",
        model="tiny",
        options=TrainingOptions(device=device),
        data_files=(),
        file_id=None,
        suffix="",
        promote="final",
        created_at=float(number),
        started_at=None,
        finished_at=None,
        attempt=1,
        pid=None,
        events_offset=0,
        cancel_requested=False,
        progress=Progress(),
        error=None,
        fine_tuned_model=None,
    )


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

"""What the supervisor decides, as plain functions: which job starts next, with what, and how a run ended."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from service.jobs.job import Job, JobError, Status
from service.registry import Entry
from trainer.config import RunConfig
from trainer.option_groups import DatasetConfig
from trainer.run_folder import RunResult

Next = Literal["end", "pause", "go on", "go on after a death"]


def startable(queue: Iterable[Job], running: Iterable[Job]) -> list[Job]:
    """Jobs whose device nobody uses and no job before them waits for. `queue` is that of the store."""
    taken = [job.options.device for job in running]
    chosen = []
    for job in queue:
        if not any(may_collide(job.options.device, device) for device in taken):
            chosen.append(job)
        taken.append(job.options.device)
    return chosen


def queue_position(job: Job, queue: Sequence[Job]) -> int | None:
    """1 for the job that is next on its device; None for one that does not wait, such as a paused one."""
    ids = [other.id for other in queue]
    if job.id not in ids:
        return None
    before = queue[: ids.index(job.id)]
    return 1 + sum(may_collide(job.options.device, other.options.device) for other in before)


def may_collide(device: str, other: str) -> bool:
    """Whether two device strings may mean one device. `auto` may be any; `npu` is `npu:0`."""
    first, second = (name if ":" in name or name in ("auto", "cpu") else f"{name}:0" for name in (device, other))
    return first == second or "auto" in (first, second)


def run_config(job: Job, *, base: Path, home: Path, start: Entry | None = None) -> RunConfig:
    """What the trainer of a job is told. `base` is the folder of its base model, `start` what it begins from."""
    adapter = None if start is None else start.adapter_dir
    return RunConfig(
        **job.options.model_dump(),
        model=str(base if start is None else start.base_dir),
        model_name=start.id if start is not None and start.kind == "full" else job.model,
        start_adapter=None if adapter is None else str(adapter),
        merge_start=job.merge_start and adapter is not None,
        data_files=None if job.datasets else tuple(str(home / file) for file in job.data_files),
        datasets=tuple(in_home(dataset, home) for dataset in job.datasets) or None,
        validation=None if job.validation is None else in_home(job.validation, home),
    )


def in_home(dataset: DatasetConfig, home: Path) -> DatasetConfig:
    """With its paths, which are relative to the home folder, made whole."""
    if dataset.data_files is None:
        return dataset
    return dataset.model_copy(update={"data_files": tuple(str(home / file) for file in dataset.data_files)})


def next_step(job: Job, result: RunResult | None, *, exit_code: int | None, service_left: bool) -> Next:
    """What becomes of a running job whose trainer has ended.

    `service_left`: the service is stopping, or it was away when the trainer ended, so that nobody asked for that end.
    """
    status = "paused" if result is None and exit_code == -signal.SIGUSR1 else result and result.status
    if job.cancel_requested or status in ("succeeded", "failed"):
        return "end"
    if job.pause_requested and (status is not None or exit_code is None or service_left):
        return "pause"
    if status == "paused" or (status == "cancelled" and service_left):
        return "go on"
    return "go on after a death" if service_left else "end"


def outcome(
    result: RunResult | None, *, exit_code: int | None, cancel_requested: bool, log_tail: str
) -> tuple[Status, JobError | None]:
    """The final state of a job whose trainer has ended. `exit_code` is None where another process saw it.

    A cancel that was accepted stays one, also where the trainer came to its end first: what is cancelled never
    promotes.
    """
    if cancel_requested:
        return "cancelled", None
    if result is None:
        return "failed", JobError(code="trainer_died", message=cause_of_death(exit_code), log_tail=log_tail)
    if result.status == "failed":
        code, message = result.error_code or "internal_error", result.error_message or "the trainer gave no reason"
        return "failed", JobError(code=code, message=message, param=result.error_param, log_tail=log_tail)
    assert result.status != "paused", "such a job goes on"
    return result.status, None


def cause_of_death(exit_code: int | None) -> str:
    if exit_code is None:
        return "the trainer ended without a result while no service process was its parent; its exit code is unknown"
    if exit_code >= 0:
        return f"the trainer ended with exit code {exit_code} and without a result"
    killed = f"the trainer was killed by {signal.Signals(-exit_code).name}"
    return f"{killed}, possibly for lack of memory" if -exit_code == signal.SIGKILL else killed

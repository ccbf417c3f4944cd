"""What a job is: its states, its errors and how far it is. Plain data, without a database or a process."""

from __future__ import annotations

import secrets
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from trainer.config import TrainingOptions
from trainer.option_groups import DatasetConfig

Status = Literal["validating_files", "queued", "running", "succeeded", "failed", "cancelled"]
Promote = Literal["final", "each", "best", "manual"]

FINISHED: tuple[Status, ...] = ("succeeded", "failed", "cancelled")
"""Terminal states. The event of the same name is the last one of a job."""

ID_ALPHABET = string.ascii_letters + string.digits


def new_id(prefix: str) -> str:
    return prefix + "".join(secrets.choice(ID_ALPHABET) for _ in range(24))


@dataclass(frozen=True, slots=True, kw_only=True)
class JobError:
    code: str
    message: str
    param: str | None = None
    log_tail: str = ""
    """The last lines that the trainer printed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """The newest events of the current attempt, by type, as the trainer wrote them."""

    started: dict[str, Any] | None = None
    dataset: dict[str, Any] | None = None
    first_step: dict[str, Any] | None = None
    step: dict[str, Any] | None = None
    validation: dict[str, Any] | None = None

    def after(self, event: Mapping[str, Any]) -> Progress:
        """This progress with one more event of the trainer."""
        known = {name: getattr(self, name) for name in self.__slots__}
        if event["type"] in known:
            known[event["type"]] = dict(event)
        if event["type"] == "resumed":
            known["first_step"] = None  # the time until now says nothing about the pace
        if event["type"] == "step" and known["first_step"] is None:
            known["first_step"] = dict(event)
        return Progress(**known)

    @property
    def eta_s(self) -> float | None:
        """Seconds to the last step at the pace so far, checkpoints included. None before two steps are known."""
        if self.first_step is None or self.step is None or self.step["step"] == self.first_step["step"]:
            return None
        pace: float = (self.step["time"] - self.first_step["time"]) / (self.step["step"] - self.first_step["step"])
        return pace * max(0, int(self.step["total_steps"]) - int(self.step["step"]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    id: str
    status: Status
    paused: bool = False
    """Beside `queued`, and beside `validating_files`: it is not started before somebody resumes it."""
    model: str
    """Name of the base model."""
    options: TrainingOptions
    data_files: tuple[str, ...]
    """All local files that are trained on, relative to the home folder."""
    datasets: tuple[DatasetConfig, ...] = ()
    """What is trained on, where `data_files` with the options alone does not say it. Paths are relative to home."""
    validation: DatasetConfig | None = None
    """What is held out. Paths are relative to home."""
    start_from: str | None = None
    """Id of the registry's entry that training begins from; None: the base model."""
    merge_start: bool = False
    """Merge the adapter `start_from` and train a new one on the result, rather than that one further."""
    file_id: str | None
    validation_file_id: str | None = None
    file_ids: tuple[str, ...] = ()
    """All uploaded files that it reads."""
    result_files: tuple[str, ...] = ()
    """Ids of the files in /v1/files that tell its metrics, once it has succeeded."""
    suffix: str
    promote: Promote
    priority: int = 0
    """Higher ones are started first."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    webhook: str | None = None
    """URL that is told of its end."""
    idempotency_key: str | None = None
    request_hash: str | None = None
    """Of the request that `idempotency_key` came with."""
    created_at: float
    started_at: float | None
    finished_at: float | None
    attempt: int
    """Which of its trainers this is: 1 is the first, and each that goes on with the run is one more."""
    restarts: int = 0
    """How many of those followed a trainer that was gone without a word; counted anew when somebody resumes it."""
    pid: int | None
    events_offset: int
    """Bytes of the trainer's events.jsonl that are in the store."""
    cancel_requested: bool
    pause_requested: bool = False
    progress: Progress
    error: JobError | None
    fine_tuned_model: str | None
    notes: tuple[str, ...] = ()
    """What of a configuration of torchtune was mapped rather than taken as it is."""
    run_name: str = ""
    """Its folder under runs/."""

    @property
    def finished(self) -> bool:
        return self.status in FINISHED

    @property
    def local_sets(self) -> list[DatasetConfig]:
        """Everything that is read from local files, the held-out records included."""
        trained = self.datasets or (DatasetConfig(data_files=self.data_files),)
        held_out = () if self.validation is None else (self.validation,)
        return [chosen for chosen in (*trained, *held_out) if chosen.data_files is not None]

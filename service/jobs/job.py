"""What a job is: its states, its errors and how far it is. Plain data, without a database or a process."""

from __future__ import annotations

import secrets
import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from trainer.config import TrainingOptions

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
        if event["type"] == "step" and self.first_step is None:
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
    model: str
    """Name of the base model."""
    options: TrainingOptions
    data_files: tuple[str, ...]
    """Relative to the home folder."""
    file_id: str | None
    suffix: str
    promote: Promote
    created_at: float
    started_at: float | None
    finished_at: float | None
    attempt: int
    """1 at first; one more each time the service restarted without the trainer."""
    pid: int | None
    events_offset: int
    """Bytes of the trainer's events.jsonl that are in the store."""
    cancel_requested: bool
    progress: Progress
    error: JobError | None
    fine_tuned_model: str | None
    notes: tuple[str, ...] = ()
    """What of a configuration of torchtune was mapped rather than taken as it is."""

    @property
    def finished(self) -> bool:
        return self.status in FINISHED

    @property
    def run_name(self) -> str:
        """Folder under runs/. A new attempt gets a new folder: checkpoints of the old one may be served already."""
        return self.id if self.attempt == 1 else f"{self.id}.attempt{self.attempt}"

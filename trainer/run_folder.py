"""The folder of one training run, the only channel between a trainer and whoever watches it. Torch-free.

config.yaml      the RunConfig, written by whoever starts the run
events.jsonl     one JSON object a line, appended by the trainer
metrics.csv      one row a step
log.txt          what the trainer printed, written by whoever started it
lock             held (flock) while a trainer lives
state/step_N/    training state, the newest only; state/data/ the records as token ids
adapters/step_N/, checkpoints/step_N/   published whole: a folder with its final name is complete
tensorboard/     event files, and wandb/ where that tracks the run; tracking.json: what each tracker calls the run
result.json      written last: the run is over, or paused

A run that goes on in its folder removes result.json and says `resumed` with the step it goes on behind: what the events
tell of later steps before that is told again.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lm.folder import write_atomic

RunStatus = Literal["succeeded", "failed", "cancelled", "paused"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """How a run ended."""

    status: RunStatus
    error_code: str | None = None
    """`invalid_training_file`, `out_of_memory`, `non_finite_loss`, `invalid_config`, `internal_error` ..."""
    error_message: str | None = None
    error_param: str | None = None


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths and files of one run."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.csv"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    @property
    def lock(self) -> Path:
        return self.path / "lock"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapters(self) -> Path:
        return self.path / "adapters"

    @property
    def base(self) -> Path:
        """The model that the adapters are for, where it is not the configuration's own: see `merge_start`."""
        return self.path / "base"

    @property
    def state(self) -> Path:
        return self.path / "state"

    def read_events(self, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
        """The events after byte `offset`, and the offset to go on from. A half-written last line is left for later."""
        try:
            with self.events.open("rb") as file:
                file.seek(offset)
                data = file.read()
        except FileNotFoundError:
            return [], offset
        whole = data[: data.rfind(b"\n") + 1]
        return [json.loads(line) for line in whole.splitlines()], offset + len(whole)

    def read_result(self) -> RunResult | None:
        try:
            return RunResult(**json.loads(self.result.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None

    def write_result(self, result: RunResult) -> None:
        write_atomic(self.result, json.dumps(asdict(result), ensure_ascii=False, indent=2).encode())

    def remove_unfinished(self) -> None:
        """Remove what a killed trainer was writing: a checkpoint, a state. Only once the trainer is dead."""
        for parent in (self.adapters, self.checkpoints, self.state, self.path):
            for path in parent.glob(".*.tmp"):
                shutil.rmtree(path, ignore_errors=True)

    def remove_state(self) -> None:
        """Remove what only serves to go on, once there is nothing to go on with."""
        shutil.rmtree(self.state, ignore_errors=True)

    def remove_states(self, *, but: int | None = None) -> None:
        """Remove the training states, except that of step `but`. One is renamed first, so that no half of it is found."""
        for path in self.state.glob("step_*"):
            if path.name != f"step_{but}":
                doomed = path.with_name(f".{path.name}.tmp")
                shutil.rmtree(doomed, ignore_errors=True)
                path.rename(doomed)
                shutil.rmtree(doomed, ignore_errors=True)

    def newest_state(self) -> Path | None:
        """The training state that the run can go on from, if there is one."""
        states = [path for path in self.state.glob("step_*") if path.name.removeprefix("step_").isdecimal()]
        return max(states, key=lambda path: int(path.name.removeprefix("step_")), default=None)

    def log_tail(self, num_lines: int = 20, max_bytes: int = 16_384) -> str:
        """The last lines of the log. A progress bar's redrawn states count as one line."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - max_bytes))
                text = file.read().decode("utf-8", "replace")
        except FileNotFoundError:
            return ""
        lines = [line.rstrip("\r").rsplit("\r", 1)[-1] for line in text.split("\n")]
        return "\n".join([line for line in lines if line.strip()][-num_lines:])

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run. Raises BlockingIOError when another trainer has it; the kernel frees it on any death."""
        with self.lock.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield

    def is_locked(self) -> bool:
        """Whether a trainer is alive in this folder."""
        if not self.lock.exists():
            return False
        with self.lock.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False

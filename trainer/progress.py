"""What a run says while it goes on: events.jsonl and metrics.csv for programs, a progress bar for people. Torch-free."""

from __future__ import annotations

import csv
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol, Self, TypeVar

from tqdm import tqdm

from trainer.run_folder import RunFolder

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One optimizer step; the fields are the columns of metrics.csv, where None is an empty cell."""

    step: int
    total_steps: int
    epoch: int
    loss: float
    """Mean over the trained tokens of the step; of dpo over its pairs."""
    learning_rate: float
    grad_norm: float
    """Before clipping."""
    trained_tokens_per_second: float
    processed_tokens_per_second: float
    """Prompts included, padding not; over the whole step, data and optimizer included."""
    trained_tokens: int
    """Since the start of the run."""
    peak_memory_bytes: int
    token_accuracy: float | None = None
    """Share of the trained tokens that were the likeliest ones."""
    reward_accuracy: float | None = None
    """dpo: share of the pairs whose preferred answer has the higher reward."""
    reward_margin: float | None = None
    """dpo: mean difference of the rewards of a pair."""


COLUMNS = [field.name for field in fields(StepReport)]


class Listener(Protocol):
    """Hears every event of a run, such as a tracker."""

    def event(self, type: str, values: Mapping[str, Any]) -> Iterable[str]:
        """Take an event. Returns what the run shall be warned of."""

    def close(self, error: BaseException | None) -> Iterable[str]:
        """The run is over, by `error` if not by itself."""


class Progress:
    """Appends to a run's events and metrics; each line is whole and readable at once. Use it as a context."""

    def __init__(self, folder: RunFolder) -> None:
        _cut_half_line(folder.events)
        self._events = folder.events.open("a", encoding="utf-8")
        self._path = folder.metrics
        _cut_half_line(self._path)
        self._metrics, self._table = _open_table(self._path)
        self._listeners: list[Listener] = []
        self._bar: tqdm[Any] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for listener in self._listeners:
            for message in listener.close(error):
                self._append("warning", {"message": message})
        self._events.close()
        self._metrics.close()

    def attach(self, listener: Listener) -> None:
        """Let `listener` hear every event from now on."""
        self._listeners.append(listener)

    def resume(self, step: int) -> None:
        """Say that the run goes on behind `step` (0: from its start), and take the later rows out of the metrics."""
        self._metrics.close()
        cut_metrics(self._path, step)
        self._metrics, self._table = _open_table(self._path)
        self.event("resumed", step=step)

    def event(self, type: str, **values: Any) -> None:
        self._append(type, values)
        for listener in self._listeners:
            for message in listener.event(type, values):
                self._append("warning", {"message": message})

    def step(self, report: StepReport) -> None:
        self.event("step", **asdict(report))
        self._table.writerow(asdict(report))
        self._metrics.flush()
        if self._bar is not None:
            self._bar.set_description(f"{report.epoch}|{report.step}|Loss: {report.loss:.5f}")

    def bar(self, steps: Iterable[T], total: int, done: int = 0) -> Iterator[T]:
        """Go through the steps of one epoch behind a bar on stderr: `1|20|Loss: 0.29977: 100%|...`.

        `done` of `total` are behind the run already.
        """
        with tqdm(steps, total=total, initial=done) as self._bar:
            yield from self._bar
        self._bar = None

    def _append(self, type: str, values: Mapping[str, Any]) -> None:
        line = json.dumps({"type": type, "time": time.time(), **values}, ensure_ascii=False, allow_nan=False)
        self._events.write(line + "\n")
        self._events.flush()


def cut_metrics(path: Path, step: int) -> None:
    """Leave the rows of the steps up to `step` in a metrics.csv, under today's columns."""
    temporary = path.with_name(f".{path.name}.tmp")
    with path.open(encoding="utf-8", newline="") as old, temporary.open("w", encoding="utf-8", newline="") as new:
        table = csv.DictWriter(new, COLUMNS, extrasaction="ignore")
        table.writeheader()
        for row in csv.DictReader(old):
            if (row["step"] or "").isdecimal() and int(row["step"]) <= step:
                table.writerow(row)
    temporary.replace(path)


def _open_table(path: Path) -> tuple[IO[str], csv.DictWriter[str]]:
    file = path.open("a", encoding="utf-8", newline="")
    table = csv.DictWriter(file, COLUMNS)
    if file.tell() == 0:
        table.writeheader()
        file.flush()
    return file, table


def _cut_half_line(path: Path) -> None:
    """Take away the line that a killed trainer was writing: it must neither grow by what is appended nor be read."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        if file.read() != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)

"""What a run says while it goes on: events.jsonl and metrics.csv for programs, a progress bar for people."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from types import TracebackType
from typing import Any, Self, TypeVar

from tqdm import tqdm

from trainer.run_folder import RunFolder

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One optimizer step; the fields are the columns of metrics.csv."""

    step: int
    total_steps: int
    epoch: int
    loss: float
    """Mean over the trained tokens of the step."""
    learning_rate: float
    grad_norm: float
    """Before clipping."""
    trained_tokens_per_second: float
    processed_tokens_per_second: float
    """Prompts included, padding not; over the whole step, data and optimizer included."""
    trained_tokens: int
    """Since the start of the run."""
    peak_memory_bytes: int


class Progress:
    """Appends to a run's events and metrics; each line is whole and readable at once. Use it as a context."""

    def __init__(self, folder: RunFolder) -> None:
        self._events = folder.events.open("a", encoding="utf-8")
        self._metrics = folder.metrics.open("a", encoding="utf-8", newline="")
        self._table = csv.DictWriter(self._metrics, [field.name for field in fields(StepReport)])
        self._table.writeheader()
        self._bar: tqdm[Any] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._events.close()
        self._metrics.close()

    def event(self, type: str, **values: Any) -> None:
        line = json.dumps({"type": type, "time": time.time(), **values}, ensure_ascii=False, allow_nan=False)
        self._events.write(line + "\n")
        self._events.flush()

    def step(self, report: StepReport) -> None:
        self.event("step", **asdict(report))
        self._table.writerow(asdict(report))
        self._metrics.flush()
        if self._bar is not None:
            self._bar.set_description(f"{report.epoch}|{report.step}|Loss: {report.loss:.5f}")

    def bar(self, steps: Iterable[T], total: int) -> Iterator[T]:
        """Go through the steps of one epoch behind a bar on stderr: `1|20|Loss: 0.29977: 100%|...`."""
        with tqdm(steps, total=total) as self._bar:
            yield from self._bar
        self._bar = None

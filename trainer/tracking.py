"""The figures of a run on their way to trackers, which can neither stop nor delay it. Torch-free.

Each tracker has a thread and a queue of its own. What one raises is a warning of the run, and then it is left alone.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import math
import os
import queue
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lm.errors import UserError
from lm.folder import write_atomic
from trainer.config import RunConfig, TrainingOptions
from trainer.option_groups import TrackingConfig
from trainer.outcome import Cancelled, Paused
from trainer.run_folder import RunFolder
from trainer.trackers import Figures, Mlflow, RunFacts, TensorBoard, Tracker, Wandb

log = logging.getLogger(__name__)

IDS_FILE = "tracking.json"
"""In the run folder: what each tracker calls the run."""
MAX_WAITING = 10_000
"""Steps that wait for a slow tracker; later ones are left out."""
CLOSE_SECONDS, STOP_SECONDS = 60.0, 5.0
PREFIXES = {"step": "train", "validation": "validation"}
NO_FIGURES = ("step", "total_steps")


@dataclass(frozen=True, slots=True)
class Texts:
    step: int
    texts: Mapping[str, str]


def check_tracking(config: TrackingConfig) -> None:
    """Raise UserError where a tracker that is asked for is not installed, or not told where to go."""
    for name, module in (("wandb", "wandb"), ("mlflow", "mlflow")):
        if getattr(config, name) is not None and importlib.util.find_spec(module) is None:
            raise UserError(
                f"tracking.{name}: the package {module} is not installed; run `pip install tuneserve[{name}]`, or "
                f"leave tracking.{name} out",
                param=f"tracking.{name}",
            )
    if config.mlflow is not None and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise UserError(
            "tracking.mlflow: the environment does not say where the server is; set MLFLOW_TRACKING_URI",
            param="tracking.mlflow",
        )


def start_trackers(config: RunConfig, folder: RunFolder) -> Trackers:
    """A listener for `Progress.attach`. A tracker is opened when there is something to tell it.

    Raises UserError as `check_tracking` does.
    """
    check_tracking(config.tracking)
    trackers: list[Tracker] = [TensorBoard()] if config.tracking.tensorboard else []
    if config.tracking.wandb is not None:
        trackers.append(Wandb(config.tracking.wandb))
    if config.tracking.mlflow is not None:
        trackers.append(Mlflow(config.tracking.mlflow))
    return Trackers(trackers, config, folder)


class Trackers:
    def __init__(
        self, trackers: Iterable[Tracker], config: RunConfig, folder: RunFolder, *, patience: float = CLOSE_SECONDS
    ) -> None:
        """At the end the trackers have `patience` seconds, all together, to deliver what they have."""
        options = config.model_dump(mode="json", include=set(TrainingOptions.model_fields) - {"tracking"})
        name = folder.path.resolve().name
        facts = RunFacts(name=name, folder=folder.path, options=options, known_id=None, last_step=None)
        ids = _Ids(folder)
        self._couriers = [_Courier(tracker, facts, ids) for tracker in trackers]
        self._patience = patience

    def event(self, type: str, values: Mapping[str, Any]) -> Iterable[str]:
        """Pass on figures and samples. Returns what has gone wrong since the last call."""
        if type == "resumed":
            for courier in self._couriers:
                courier.resume(values["step"])
        elif type in PREFIXES:
            figures = {f"{PREFIXES[type]}/{name}": value for name, value in values.items() if _is_figure(name, value)}
            self._send(Figures(values["step"], time.time(), figures))
        elif type == "samples":
            self._send(Texts(values["step"], {one["prompt"]: one["text"] for one in values["samples"]}))
        return [message for courier in self._couriers for message in courier.complaints()]

    def close(self, error: BaseException | None) -> Iterable[str]:
        is_stopped = isinstance(error, Cancelled | Paused)
        status = "FINISHED" if error is None else "KILLED" if is_stopped else "FAILED"
        # Who stops a run waits for it
        end = time.monotonic() + (min(self._patience, STOP_SECONDS) if is_stopped else self._patience)
        for courier in self._couriers:
            courier.finish(status)
        for courier in self._couriers:
            courier.wait(max(0.0, end - time.monotonic()))
        return [message for courier in self._couriers for message in courier.complaints()]

    def _send(self, item: Figures | Texts) -> None:
        for courier in self._couriers:
            courier.send(item)


class _Ids:
    """What each tracker calls the run, kept in the run folder."""

    def __init__(self, folder: RunFolder) -> None:
        self._path = folder.path / IDS_FILE
        self._lock = threading.Lock()

    def get(self, name: str) -> str | None:
        with self._lock:
            return self._read().get(name)

    def set(self, name: str, value: str) -> None:
        with self._lock:
            write_atomic(self._path, json.dumps(self._read() | {name: value}).encode())

    def _read(self) -> dict[str, str]:
        known: dict[str, str] = json.loads(self._path.read_text(encoding="utf-8")) if self._path.is_file() else {}
        return known


class _Courier:
    """Brings what one tracker is told to it, in a thread that begins with the first message."""

    def __init__(self, tracker: Tracker, facts: RunFacts, ids: _Ids) -> None:
        self._tracker = tracker
        self._facts = facts
        self._ids = ids
        self._waiting: queue.Queue[Figures | Texts | str] = queue.Queue(MAX_WAITING)
        self._complaints: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._num_dropped = 0
        self._is_lost = False
        self._takes_texts = True

    def resume(self, step: int) -> None:
        self._facts = replace(self._facts, last_step=step)

    def send(self, item: Figures | Texts) -> None:
        if self._is_lost:
            return
        if self._thread is None:
            # A daemon, since a server that does not answer must not keep the process
            self._thread = threading.Thread(target=self._work, name=f"tracking-{self._tracker.name}", daemon=True)
            self._thread.start()
        try:
            self._waiting.put_nowait(item)
        except queue.Full:
            self._num_dropped += 1

    def finish(self, status: str) -> None:
        if self._thread is None:
            return
        with contextlib.suppress(queue.Empty):
            if self._waiting.full():  # room for this one
                self._waiting.get_nowait()
                self._num_dropped += 1
        self._waiting.put_nowait(status)

    def wait(self, seconds: float) -> None:
        if self._thread is None:
            return
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._complain("it did not take everything before the run ended; the figures are in metrics.csv")
        if self._num_dropped:
            self._complain(f"it was too slow for {self._num_dropped} steps; they are in metrics.csv")

    def complaints(self) -> Iterable[str]:
        while not self._complaints.empty():
            yield self._complaints.get()

    def _complain(self, reason: str) -> None:
        self._complaints.put(f"tracking.{self._tracker.name}: {reason}")

    def _work(self) -> None:
        try:
            given = self._tracker.open(replace(self._facts, known_id=self._ids.get(self._tracker.name)))
            if given is not None:
                self._ids.set(self._tracker.name, given)
            self._deliver()
        except Exception as error:
            self._is_lost = True
            log.warning("tracking.%s is lost", self._tracker.name, exc_info=True)
            self._complain(f"{_told(error)}; the run goes on without it")

    def _deliver(self) -> None:
        while True:
            items = self._next()
            points = [item for item in items if isinstance(item, Figures)]
            if points:
                self._tracker.log(points)
            for item in items:
                if isinstance(item, Texts):
                    self._tell(item)
                if isinstance(item, str):
                    self._tracker.close(item)
                    return

    def _next(self) -> list[Figures | Texts | str]:
        """Everything that waits, once something does: one request for many steps where a server is slow."""
        items = [self._waiting.get()]
        while not self._waiting.empty():
            items.append(self._waiting.get())
        return items

    def _tell(self, item: Texts) -> None:
        """A tracker that takes no texts, for want of a place for files, is still told the figures."""
        if not self._takes_texts:
            return
        try:
            self._tracker.text(item.step, item.texts)
        except Exception as error:
            self._takes_texts = False
            log.warning("tracking.%s takes no samples", self._tracker.name, exc_info=True)
            self._complain(f"it does not take the samples: {_told(error)}")


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()):.500}"


def _is_figure(name: str, value: Any) -> bool:
    if name in NO_FIGURES or isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value)

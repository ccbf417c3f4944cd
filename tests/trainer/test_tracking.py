"""Trackers as their own libraries write them, offline, and trackers that fail, hang or are not there."""

from __future__ import annotations

import contextlib
import random
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboardX.crc32c import crc32c
from tensorboardX.proto.event_pb2 import Event

from lm.errors import UserError
from tests.support.runs import events, make_run
from tests.trainer.test_progress import report
from trainer.config import RunConfig, load_run_config
from trainer.option_groups import TrackingConfig
from trainer.outcome import Cancelled, Paused
from trainer.progress import Progress
from trainer.run_folder import RunFolder
from trainer.trackers import Figures, RunFacts, Tracker
from trainer.tracking import MAX_WAITING, Trackers, check_tracking, start_trackers

OFF = {"tensorboard": False}


def make(folder: Path, **tracking: Any) -> tuple[RunFolder, RunConfig]:
    run = make_run(folder / "run-1", folder / "model", seed=5, tracking=tracking)
    return run, load_run_config(run.config)


def tell(run: RunFolder, config: RunConfig, *steps: int, resumed: int | None = None) -> None:
    with Progress(run) as progress:
        progress.attach(start_trackers(config, run))
        if resumed is not None:
            progress.resume(resumed)
        for step in steps:
            progress.step(report(step, token_accuracy=0.5))
        progress.event("validation", step=steps[-1], loss=1.0, perplexity=2.5, token_accuracy=0.25)
        progress.event("samples", step=steps[-1], samples=[{"prompt": "Who?", "text": "Tuna"}])


def warnings(run: RunFolder) -> list[str]:
    return [event["message"] for event in events(run, "warning")]


# ---- TensorBoard


def tensorboard_events(run: RunFolder) -> Iterator[Any]:
    """The records of all event files in order: length, its checksum, an Event, its checksum."""
    for path in sorted((run.path / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            body = data[12 : 12 + length]
            for part, found in ((data[:8], data[8:12]), (body, data[12 + length : 16 + length])):
                crc = crc32c(part)
                assert struct.unpack("<I", found) == ((((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF,)
            yield Event.FromString(body)
            data = data[16 + length :]


def scalars(run: RunFolder, tag: str) -> list[tuple[int, float]]:
    found = []
    for event in tensorboard_events(run):
        found += [(event.step, value.simple_value) for value in event.summary.value if value.tag == tag]
    return found


def test_tensorboard_files_are_written_by_default_and_hold_every_figure(tmp_path: Path) -> None:
    run, config = make(tmp_path)
    tell(run, config, 1, 2)
    assert dict(scalars(run, "train/loss")) == pytest.approx({1: 1 / 3, 2: 1 / 4})
    assert scalars(run, "train/token_accuracy") == [(1, 0.5), (2, 0.5)]
    assert scalars(run, "validation/perplexity") == [(2, 2.5)]
    tags = {value.tag for event in tensorboard_events(run) for value in event.summary.value}
    assert "train/reward_margin" not in tags  # it has none
    assert "train/step" not in tags
    [text] = [v.tensor for e in tensorboard_events(run) for v in e.summary.value if v.tag.startswith("samples/0")]
    assert b"Tuna" in text.string_val[0]
    assert warnings(run) == []


def test_a_resumed_run_hides_what_tensorboard_was_told_of_later_steps(tmp_path: Path) -> None:
    run, config = make(tmp_path)
    tell(run, config, 1, 2, 3)
    tell(run, config, 2, 3, resumed=1)
    started = [event.step for event in tensorboard_events(run) if event.session_log.status == 1]
    assert started == [2]  # readers drop what came before with this step or a later one
    assert [step for step, _ in scalars(run, "train/loss")] == [1, 2, 3, 2, 3]


def test_without_trackers_nothing_is_written(tmp_path: Path) -> None:
    run, config = make(tmp_path, **OFF)
    tell(run, config, 1)
    assert {path.name for path in run.path.iterdir()} == {"config.yaml", "data.json", "events.jsonl", "metrics.csv"}


# ---- Weights & Biases, MLflow


def test_weights_and_biases_gets_the_same_run_again_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run, config = make(tmp_path, **OFF, wandb={"project": "p", "tags": ["a"]})
    tell(run, config, 1, 2)
    tell(run, config, 2, 3, resumed=1)
    assert warnings(run) == []
    names = sorted(path.name for path in (run.path / "wandb").glob("offline-run-*"))
    assert len(names) == 2
    assert len({name.rpartition("-")[2] for name in names}) == 1
    stored = b"".join(path.read_bytes() for path in (run.path / "wandb").glob("offline-run-*/*.wandb"))
    for expected in (b"train/loss", b"validation/perplexity", b"run-1", b"learning_rate", b"samples"):
        assert expected in stored
    assert b"data.json" not in stored  # where the data is stays here


def test_mlflow_gets_the_figures_in_one_run_over_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    run, config = make(tmp_path, **OFF, mlflow={"experiment": "facts", "name": "first"})
    tell(run, config, 1, 2)
    tell(run, config, 2, 3, resumed=1)
    assert warnings(run) == []
    client = MlflowClient((tmp_path / "store").as_uri())
    experiment = client.get_experiment_by_name("facts")
    assert experiment is not None
    [kept] = client.search_runs([experiment.experiment_id])
    assert (kept.info.run_name, kept.info.status) == ("first", "FINISHED")
    assert kept.data.params["seed"] == "5"
    assert kept.data.params["lora.rank"] == "8"
    told = [(metric.step, metric.value) for metric in client.get_metric_history(kept.info.run_id, "train/loss")]
    assert sorted(set(told)) == [(1, 1 / 3), (2, 1 / 4), (3, 1 / 5)]
    assert kept.data.metrics["validation/perplexity"] == 2.5
    [samples] = [path for path in (tmp_path / "store").rglob("step_3.md")]
    assert "Tuna" in samples.read_text(encoding="utf-8")


def test_random_numbers_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    run, config = make(tmp_path, mlflow={"experiment": "facts"})
    before = random.getstate(), torch.get_rng_state()
    tell(run, config, 1)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_a_mistake_before_the_training(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    config = TrackingConfig.model_validate({"wandb": {"project": "p"}, "mlflow": {"experiment": "e"}})
    with pytest.raises(UserError, match=rf"tracking\.{name}: the package {name} is not installed") as caught:
        check_tracking(config.model_copy(update={"mlflow" if name == "wandb" else "wandb": None}))
    assert caught.value.param == f"tracking.{name}"


def test_mlflow_without_a_server_is_a_mistake_before_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match="set MLFLOW_TRACKING_URI"):
        check_tracking(TrackingConfig.model_validate({"mlflow": {"experiment": "e"}}))


def test_an_mlflow_store_that_refuses_only_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "gopher://nowhere")
    run, config = make(tmp_path, mlflow={"experiment": "facts"})
    tell(run, config, 1, 2)
    [message] = warnings(run)
    assert message.startswith("tracking.mlflow: ")
    assert "gopher" in message
    assert message.endswith("the run goes on without it")
    assert len(scalars(run, "train/loss")) == 2  # TensorBoard's goes on, too


# ---- trackers that fail


class Scripted:
    """A tracker that waits for `go` before each batch of figures, and fails as it is told."""

    name = "scripted"

    def __init__(self, *, fail: Sequence[str] = (), go: threading.Event | None = None) -> None:
        self.fail = fail
        self.go = go
        self.told: list[Any] = []

    def _do(self, what: str, detail: Any) -> None:
        if self.go is not None:
            self.go.wait()
        if what in self.fail:
            raise RuntimeError(f"no\n{what}")
        self.told.append((what, detail))

    def open(self, run: RunFacts) -> str:
        self._do("open", run.known_id)
        return "id-7"

    def log(self, points: Sequence[Figures]) -> None:
        for point in points:
            self._do("log", point.step)

    def text(self, step: int, texts: Mapping[str, str]) -> None:
        self._do("text", dict(texts))

    def close(self, status: str) -> None:
        self._do("close", status)


def run_with(folder: Path, tracker: Tracker, *, patience: float = 60, error: Exception | None = None) -> RunFolder:
    run, config = make(folder)
    expected = contextlib.nullcontext() if error is None else pytest.raises(type(error))
    with expected, Progress(run) as progress:
        progress.attach(Trackers([tracker], config, run, patience=patience))
        progress.step(report(1))
        progress.event("samples", step=1, samples=[{"prompt": "Who?", "text": "Tuna"}])
        progress.step(report(2))
        if error is not None:
            raise error
    return run


@pytest.mark.parametrize("what", ["open", "log", "close"])
def test_a_tracker_that_fails_is_a_warning(tmp_path: Path, what: str) -> None:
    run = run_with(tmp_path, Scripted(fail=[what]))
    assert warnings(run) == [f"tracking.scripted: RuntimeError: no {what}; the run goes on without it"]
    assert len(events(run, "step")) == 2


def test_a_tracker_that_takes_no_samples_still_gets_the_figures(tmp_path: Path) -> None:
    tracker = Scripted(fail=["text"])
    run = run_with(tmp_path, tracker)
    assert warnings(run) == ["tracking.scripted: it does not take the samples: RuntimeError: no text"]
    assert tracker.told == [("open", None), ("log", 1), ("log", 2), ("close", "FINISHED")]


@pytest.mark.parametrize(
    ("error", "status"),
    [(None, "FINISHED"), (Cancelled("SIGTERM"), "KILLED"), (Paused(), "KILLED"), (ValueError("x"), "FAILED")],
)
def test_a_tracker_hears_how_the_run_ended(tmp_path: Path, error: Exception | None, status: str) -> None:
    tracker = Scripted()
    run_with(tmp_path, tracker, error=error)
    assert tracker.told[-1] == ("close", status)


def test_a_tracker_that_hangs_neither_stops_nor_delays_the_run(tmp_path: Path) -> None:
    go = threading.Event()
    run = run_with(tmp_path, Scripted(go=go), patience=0.05)
    assert warnings(run) == [
        "tracking.scripted: it did not take everything before the run ended; the figures are in metrics.csv"
    ]
    go.set()


def test_what_a_slow_tracker_has_no_room_for_is_counted(tmp_path: Path) -> None:
    go = threading.Event()
    tracker = Scripted(go=go)
    run, config = make(tmp_path)
    trackers = Trackers([tracker], config, run)
    for step in range(1, MAX_WAITING + 10):
        assert list(trackers.event("step", {"step": step, "loss": 1.0})) == []
    go.set()
    told = list(trackers.close(None))
    assert len(told) == 1
    assert "it was too slow for " in told[0]
    assert tracker.told[-1] == ("close", "FINISHED")


def test_a_tracker_is_opened_again_under_the_name_it_gave(tmp_path: Path) -> None:
    run, config = make(tmp_path)
    for known in (None, "id-7"):
        tracker = Scripted()
        trackers = Trackers([tracker], config, run)
        trackers.event("step", {"step": 1, "loss": 1.0})
        trackers.close(None)
        assert tracker.told[0] == ("open", known)


def test_a_run_that_ends_before_its_first_step_opens_no_tracker(tmp_path: Path) -> None:
    run, config = make(tmp_path)
    tracker = Scripted()
    trackers = Trackers([tracker], config, run)
    trackers.event("started", {"pid": 1})
    assert list(trackers.close(ValueError())) == []
    assert tracker.told == []

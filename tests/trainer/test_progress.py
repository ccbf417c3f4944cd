"""What a run leaves for programs that watch it, and what a resume does with it."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trainer.progress import COLUMNS, Progress, StepReport
from trainer.run_folder import RunFolder


def report(step: int, **values: Any) -> StepReport:
    figures: dict[str, Any] = {
        "total_steps": 9,
        "epoch": 1,
        "loss": 1 / (step + 2),
        "learning_rate": 1e-4,
        "grad_norm": 1.0,
        "trained_tokens_per_second": 10.0,
        "processed_tokens_per_second": 20.0,
        "trained_tokens": 8 * step,
        "peak_memory_bytes": 1024,
    }
    return StepReport(step=step, **(figures | values))


def tell(folder: RunFolder, *steps: int) -> None:
    with Progress(folder) as progress:
        for step in steps:
            progress.step(report(step))


def rows(folder: RunFolder) -> list[dict[str, str]]:
    with folder.metrics.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_each_step_is_a_row_and_an_event_with_the_same_figures(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with Progress(folder) as progress:
        progress.step(report(1, token_accuracy=0.5))
        [event] = folder.read_events()[0]
        [row] = rows(folder)
    assert list(row) == COLUMNS
    assert {name: float(text) for name, text in row.items() if text} == {
        name: event[name] for name in COLUMNS if event[name] is not None
    }
    assert row["token_accuracy"] == "0.5"
    assert row["reward_margin"] == ""
    assert event["reward_margin"] is None


def test_a_resumed_run_goes_on_in_the_same_files_without_the_rows_it_does_again(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    tell(folder, 1, 2, 3, 4)
    with Progress(folder) as progress:
        progress.resume(2)
        progress.step(report(3, loss=7.0))
    assert [(row["step"], row["loss"]) for row in rows(folder)] == [
        ("1", repr(1 / 3)),
        ("2", repr(1 / 4)),
        ("3", "7.0"),
    ]
    told = [(event["type"], event["step"]) for event in folder.read_events()[0]]
    assert told == [("step", 1), ("step", 2), ("step", 3), ("step", 4), ("resumed", 2), ("step", 3)]


def test_a_run_that_begins_anew_has_no_rows_left(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    tell(folder, 1)
    with Progress(folder) as progress:
        progress.resume(0)
    assert rows(folder) == []


def test_the_lines_that_a_killed_trainer_was_writing_are_gone(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    tell(folder, 1)
    _, offset = folder.read_events()
    with folder.events.open("a") as file:
        file.write('{"type": "step", "ste')
    with folder.metrics.open("a") as file:
        file.write("2,9,")
    with Progress(folder) as progress:
        progress.resume(1)
        progress.step(report(2))
    assert [event["type"] for event in folder.read_events(offset)[0]] == ["resumed", "step"]
    assert [row["step"] for row in rows(folder)] == ["1", "2"]
    assert all(row["peak_memory_bytes"] == "1024" for row in rows(folder))


def test_half_the_number_of_a_step_is_no_row(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    tell(folder, *range(1, 12))
    with folder.metrics.open("a") as file:
        file.write("1")  # of 12
    with Progress(folder) as progress:
        progress.resume(11)
    assert [row["step"] for row in rows(folder)] == [str(step) for step in range(1, 12)]


def test_metrics_of_an_older_version_get_the_columns_of_this_one(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.metrics.write_text("step,loss,gone\n1,0.25,5\n2,0.5,5\n", encoding="utf-8")
    with Progress(folder) as progress:
        progress.resume(1)
    [row] = rows(folder)
    assert list(row) == COLUMNS
    assert (row["step"], row["loss"], row["epoch"]) == ("1", "0.25", "")


class Ear:
    """A listener that keeps what it hears and complains of every warning's cause."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def event(self, type: str, values: Mapping[str, Any]) -> Iterable[str]:
        self.heard.append((type, values.get("step")))
        return ["too late"] if type == "early_stopped" else []

    def close(self, error: BaseException | None) -> Iterable[str]:
        self.heard.append(repr(error))
        return ["gone"]


def test_a_listener_hears_every_event_and_how_the_run_ended_and_its_warnings_are_events(tmp_path: Path) -> None:
    folder, ear = RunFolder(tmp_path), Ear()
    try:
        with Progress(folder) as progress:
            progress.attach(ear)
            progress.step(report(1))
            progress.event("early_stopped", step=1, best_step=1)
            raise ValueError("over")
    except ValueError:
        pass
    assert ear.heard == [("step", 1), ("early_stopped", 1), "ValueError('over')"]
    warnings = [event["message"] for event in folder.read_events()[0] if event["type"] == "warning"]
    assert warnings == ["too late", "gone"]


def test_the_bar_of_a_resumed_epoch_counts_what_is_behind_it(tmp_path: Path, capsys: Any) -> None:
    with Progress(RunFolder(tmp_path)) as progress:
        assert list(progress.bar([3, 4], 4, done=2)) == [3, 4]
    assert "4/4" in capsys.readouterr().err

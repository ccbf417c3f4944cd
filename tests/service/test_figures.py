"""Figures of a run that was resumed, for programs and for spreadsheets."""

from __future__ import annotations

import csv
import io
from typing import Any

from service.figures import as_csv, newest_figures


def step(number: int, loss: float, **more: Any) -> dict[str, Any]:
    return {"id": number, "type": "step", "time": 1.0, "step": number, "loss": loss, **more}


def test_what_a_resumed_run_does_again_is_told_once() -> None:
    validation = {"type": "validation", "step": 3, "loss": 9.0}
    events = [step(1, 4.0), step(2, 3.0), step(3, 2.0), validation, {"type": "resumed", "step": 1}, step(2, 3.5)]
    figures = newest_figures(events)
    assert [(event["step"], event["loss"]) for event in figures["step"]] == [(1, 4.0), (2, 3.5)]
    assert figures["validation"] == []


def test_a_line_of_csv_has_the_step_and_what_was_measured_after_it() -> None:
    events = [
        step(1, 4.0, token_accuracy=None),
        {"id": 2, "type": "validation", "time": 2.0, "step": 1, "loss": 5.0, "perplexity": 148.4},
        step(2, 3.0, token_accuracy=0.5),
    ]
    lines = list(csv.DictReader(io.StringIO(as_csv(newest_figures(events)))))
    assert lines == [
        {
            "step": "1",
            "time": "1.0",
            "loss": "4.0",
            "token_accuracy": "",
            "validation_loss": "5.0",
            "validation_perplexity": "148.4",
        },
        {
            "step": "2",
            "time": "1.0",
            "loss": "3.0",
            "token_accuracy": "0.5",
            "validation_loss": "",
            "validation_perplexity": "",
        },
    ]


def test_a_run_without_steps_has_a_header_only() -> None:
    assert as_csv(newest_figures([])) == "step\n"

"""The figures of a run from its events: what a resume did again stands there once."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from typing import Any

Event = dict[str, Any]
TYPES = ("step", "validation", "samples")
NO_FIGURES = ("id", "type")
"""Keys of an event that a table leaves out."""


def newest_figures(events: Iterable[Event]) -> dict[str, list[Event]]:
    """The events of each type in TYPES, in the order of their steps, one a step.

    `resumed` with a step says that later ones, told before a trainer died, are superseded.
    """
    kept: dict[str, dict[int, Event]] = {name: {} for name in TYPES}
    for event in events:
        if event["type"] == "resumed":
            kept = {name: {n: old for n, old in of.items() if n <= event["step"]} for name, of in kept.items()}
        elif event["type"] in kept:
            kept[event["type"]][event["step"]] = event
    return {name: [of[step] for step in sorted(of)] for name, of in kept.items()}


def as_csv(figures: Mapping[str, list[Event]]) -> str:
    """A line for each step, with what was measured after it on the held-out records; an unknown figure is empty."""
    validation = {event["step"]: event for event in figures["validation"]}
    lines = []
    for event in figures["step"]:
        line = {key: value for key, value in event.items() if key not in NO_FIGURES}
        held_out = validation.get(event["step"], {})
        line |= {f"validation_{key}": held_out[key] for key in held_out if key not in (*NO_FIGURES, "step", "time")}
        lines.append(line)
    columns = dict.fromkeys(key for line in lines for key in line if key != "step")
    text = io.StringIO()
    writer = csv.DictWriter(text, ["step", *columns], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()

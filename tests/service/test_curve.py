"""The picture of a run's losses, read as the XML that it is."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.curve import HEIGHT, MAX_POINTS, MAX_TICKS, TRAINING, VALIDATION, WIDTH, loss_curve, thinned, ticks

SVG = "{http://www.w3.org/2000/svg}"
Event = dict[str, Any]


def step(number: int, loss: Any) -> Event:
    return {"type": "step", "step": number, "loss": loss}


def validation(number: int, loss: float) -> Event:
    return {"type": "validation", "step": number, "loss": loss}


def picture(events: Iterable[Event], title: str = "ftjob-1") -> ElementTree.Element:
    root = ElementTree.fromstring(loss_curve(events, title=title))
    assert root.tag == f"{SVG}svg"
    return root


def drawn(root: ElementTree.Element, colour: str) -> list[tuple[float, float]]:
    """The points of the line of a colour; the legend's comes behind it."""
    path = next(path for path in root.iter(f"{SVG}path") if path.get("stroke") == colour)
    return [(float(x), float(y)) for x, y in (pair.split() for pair in path.attrib["d"][1:].split("L"))]


def texts(root: ElementTree.Element) -> list[str]:
    return [text.text or "" for text in root.iter(f"{SVG}text")]


def test_both_lines_are_drawn_within_the_picture_lower_losses_lower() -> None:
    events = [{"type": "started"}, *(step(number, 4 / number) for number in range(1, 41)), validation(20, 2.5)]
    root = picture([*events, validation(40, 1.5)])
    line = drawn(root, TRAINING)
    assert len(line) == 40
    assert all(left[0] < right[0] and left[1] <= right[1] for left, right in pairwise(line))
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in line)
    [first, second] = drawn(root, VALIDATION)
    assert (first[0], second[0]) == (line[19][0], line[39][0])
    assert {"training", "validation", "step", "loss", "10", "40"} <= set(texts(root))
    description = root.findtext(f"{SVG}desc")
    assert description == (
        "Training loss from 4 at step 1 to 0.1 at step 40. Validation loss from 2.5 at step 20 to 1.5 at step 40."
    )


def test_the_last_word_on_a_step_counts_and_what_a_resume_took_back_is_gone() -> None:
    events = [step(1, 3.0), step(2, 2.0), step(3, 9.0), validation(3, 9.0), {"type": "resumed", "step": 1}]
    again = [*events, step(2, 2.5), step(2, 1.0)]
    assert loss_curve(again, title="x") == loss_curve([step(1, 3.0), step(2, 1.0)], title="x")


def test_a_run_without_steps_says_so() -> None:
    for events in ([], [{"type": "started"}], [step(1, None)], [step(1, float("nan"))]):
        assert "No step is done yet." in texts(picture(events))


@pytest.mark.parametrize("losses", [[2.0], [0.0], [2.0, 2.0], [-1.0, -3.0], [1e-9, 1e9]])
def test_flat_short_and_steep_runs_have_a_picture(losses: list[float]) -> None:
    root = picture([step(number, loss) for number, loss in enumerate(losses, start=1)])
    assert len(drawn(root, TRAINING)) == len(losses)
    assert "nan" not in ElementTree.tostring(root, encoding="unicode")


def test_names_are_text_and_nothing_else() -> None:
    title = "</title><script>alert('1')</script>\" onload=\"x & \x00\x0b\ud800"
    root = picture([step(1, 1.0)], title)
    assert [element.tag for element in root.iter() if "script" in element.tag] == []
    assert set(root.attrib) == {
        *("viewBox", "width", "height", "role", "aria-label", "font-family", "font-size", "fill")
    }
    assert root.attrib["aria-label"] == root.findtext(f"{SVG}title")
    assert root.findtext(f"{SVG}title") == "</title><script>alert('1')</script>\" onload=\"x & "
    assert len(next(text for text in texts(picture([], "long " * 100)) if text.startswith("long"))) < 100


def test_a_long_run_is_drawn_by_means_of_its_neighbours() -> None:
    text = loss_curve((step(number, float(number % 2)) for number in range(100_000)), title="long")
    assert len(text) < 20_000
    line = thinned({number: float(number % 2) for number in range(100_000)})
    assert len(line) <= MAX_POINTS
    assert all(abs(loss - 0.5) < 0.01 for _, loss in line)


@settings(max_examples=200)
@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_are_few_and_lie_inside(low: float, size: float) -> None:
    high = low + size
    if (high - low) < 1e-9 * max(abs(low), abs(high), 1e-6):
        return
    found = ticks(low, high)
    assert 1 <= len(found) <= MAX_TICKS + 2
    slack = 1e-6 * max(abs(low), abs(high), high - low)
    assert all(low - slack <= value <= high + slack for value in found)

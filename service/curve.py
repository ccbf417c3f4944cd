"""The losses of a run as a picture: SVG text, without a library. Knows nothing of jobs; it reads a run's events.

Blue and vermilion of Okabe and Ito's palette, which people with any kind of colour vision tell apart; the two lines also
differ in their marks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from xml.sax.saxutils import escape, quoteattr

from service.figures import Event, newest_figures

WIDTH, HEIGHT = 800, 400
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 40, 48
MAX_POINTS = 600
"""Of a line; more steps are drawn as the means of so many groups."""
MAX_TICKS = 6
TRAINING, VALIDATION, INK, GRID = "#0072B2", "#D55E00", "#222222", "#DDDDDD"

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Losses:
    training: dict[int, float]
    """By step; in order."""
    validation: dict[int, float]


@dataclass(frozen=True, slots=True)
class _Scale:
    """From values to places in the picture."""

    low: float
    high: float
    first: float
    last: float

    def __call__(self, value: float) -> float:
        return self.first + (value - self.low) / (self.high - self.low) * (self.last - self.first)


def _losses(events: Iterable[Event]) -> Losses:
    figures = newest_figures(events)
    return Losses(training=_by_step(figures["step"]), validation=_by_step(figures["validation"]))


def _by_step(events: Iterable[Event]) -> dict[int, float]:
    known = ((event["step"], event.get("loss")) for event in events)
    return {step: float(loss) for step, loss in known if isinstance(loss, int | float) and math.isfinite(loss)}


def loss_curve(events: Iterable[Event], *, title: str) -> str:
    """An SVG picture of the training loss and, where there is one, the validation loss, over the steps."""
    losses = _losses(events)
    if not losses.training and not losses.validation:
        return _svg(title, "No step is done yet.", [_text(WIDTH / 2, HEIGHT / 2, "No step is done yet.", "middle")])
    steps = [*losses.training, *losses.validation]
    values = [*losses.training.values(), *losses.validation.values()]
    across, up = _scales(steps, values)
    parts = [*_grid(across, up), *_axes()]
    training = [(across(x), up(y)) for x, y in thinned(losses.training)]
    validation = [(across(x), up(y)) for x, y in thinned(losses.validation)]
    parts += [*_line(training, TRAINING, dots=len(training) == 1), *_line(validation, VALIDATION, dots=True)]
    return _svg(title, _described(losses), [*parts, *_legend(losses)])


def thinned(line: Mapping[int, float]) -> list[Point]:
    """At most MAX_POINTS points, each the mean of steps that follow each other."""
    points = list(line.items())
    size = math.ceil(len(points) / MAX_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)] if size else []
    return [(fmean(step for step, _ in group), fmean(loss for _, loss in group)) for group in groups]


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high`, 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / MAX_TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _scales(steps: Sequence[int], values: Sequence[float]) -> tuple[_Scale, _Scale]:
    low, high = min(values), max(values)
    margin = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
    first, last = min(steps), max(steps)
    return (
        _Scale(first - (first == last), last + (first == last), LEFT, WIDTH - RIGHT),
        _Scale(max(0.0, low - margin) if low >= 0 else low - margin, high + margin, HEIGHT - BOTTOM, TOP),
    )


def _grid(across: _Scale, up: _Scale) -> list[str]:
    parts = []
    for value in ticks(up.low, up.high):
        y = up(value)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="{GRID}"/>')
        parts.append(_text(LEFT - 8, y + 4, f"{value:.6g}", "end"))
    for value in ticks(across.low, across.high):
        if value == int(value):
            parts.append(_text(across(value), HEIGHT - BOTTOM + 20, f"{int(value)}", "middle"))
    return parts


def _axes() -> list[str]:
    return [
        f'<path d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}" fill="none" stroke="{INK}"/>',
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, "step", "middle"),
        f'<text transform="translate(14 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" text-anchor="middle">loss</text>',
    ]


def _line(points: Sequence[Point], colour: str, *, dots: bool) -> list[str]:
    if not points:
        return []
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    marks = [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in points] if dots else []
    return [f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.5" stroke-linejoin="round"/>', *marks]


def _legend(losses: Losses) -> list[str]:
    named = [("training", TRAINING, losses.training), ("validation", VALIDATION, losses.validation)]
    shown = [(name, colour) for name, colour, line in named if line]
    parts: list[str] = []
    for number, (name, colour) in enumerate(shown):
        x, y = WIDTH - RIGHT - 130, TOP + 12 + 18 * number
        parts += _line([(x, y), (x + 24, y)], colour, dots=name == "validation")
        parts.append(_text(x + 32, y + 4, name, "start"))
    return parts


def _described(losses: Losses) -> str:
    """What the picture shows, for those who hear it."""
    told = []
    for name, line in (("Training", losses.training), ("Validation", losses.validation)):
        if line:
            first, last = min(line), max(line)
            told.append(f"{name} loss from {line[first]:.4g} at step {first} to {line[last]:.4g} at step {last}.")
    return " ".join(told)


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{_safe(text)}</text>'


def _printable(text: str) -> str:
    """Without what XML has no place for at all."""
    return "".join(character for character in text if character.isprintable())


def _safe(text: str) -> str:
    return escape(_printable(text))


def _svg(title: str, description: str, parts: Iterable[str]) -> str:
    shown = title if len(title) <= 90 else title[:90] + "…"
    attributes = {
        "xmlns": "http://www.w3.org/2000/svg",
        "viewBox": f"0 0 {WIDTH} {HEIGHT}",
        "width": str(WIDTH),
        "height": str(HEIGHT),
        "role": "img",
        "aria-label": _printable(title),
        "font-family": "sans-serif",
        "font-size": "12",
        "fill": INK,
    }
    return "\n".join(
        [
            f"<svg {' '.join(f'{name}={quoteattr(value)}' for name, value in attributes.items())}>",
            f"<title>{_safe(title)}</title>",
            f"<desc>{_safe(description)}</desc>",
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#FFFFFF"/>',
            f'<text x="{LEFT}" y="24" font-size="15">{_safe(shown)}</text>',
            *parts,
            "</svg>\n",
        ]
    )

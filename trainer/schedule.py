"""Learning rate over the steps of a run."""

from __future__ import annotations

import math
from typing import Literal

from trainer.config import TrainingOptions


def learning_rate(
    step: int,
    *,
    total_steps: int,
    peak: float,
    warmup_ratio: float,
    warmup_steps: int | None = None,
    schedule: Literal["cosine", "linear", "constant"] = "cosine",
) -> float:
    """The rate of optimizer step `step`, counted from 1: up along a line to `peak`, then down to 0 along a cosine or
    a line, or constant.

    `warmup_steps` goes before `warmup_ratio`. The first step already learns (peak / warm-up steps, not 0), and 0 would
    be reached one step after the last. Behind the warm-up the cosine is that of torchtune and transformers,
    and the line that of transformers.
    """
    warmup = math.ceil(warmup_ratio * total_steps) if warmup_steps is None else warmup_steps
    if step <= warmup:
        return peak * step / warmup
    if schedule == "constant":
        return peak
    progress = (step - 1 - warmup) / (total_steps - warmup)
    if schedule == "linear":
        return peak * (1 - progress)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def planned_rate(options: TrainingOptions, total_steps: int, step: int) -> float:
    """The rate of a step of a run that takes so many."""
    return learning_rate(
        step,
        total_steps=total_steps,
        peak=options.peak_learning_rate,
        warmup_ratio=options.warmup_ratio,
        warmup_steps=options.warmup_steps,
        schedule=options.lr_schedule,
    )

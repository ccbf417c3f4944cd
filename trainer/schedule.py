"""Learning rate over the steps of a run."""

from __future__ import annotations

import math


def learning_rate(step: int, *, total_steps: int, peak: float, warmup_ratio: float) -> float:
    """The rate of optimizer step `step`, counted from 1: up along a line to `peak`, then down along a cosine to 0.

    The first step already learns (peak / warm-up steps, not 0), and 0 would be reached one step after the last.
    """
    warmup = math.ceil(warmup_ratio * total_steps)
    if step <= warmup:
        return peak * step / warmup
    progress = (step - 1 - warmup) / (total_steps - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))

"""A validation, and what the validations of a run say so far. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """Means over the units of the held-out records."""

    loss: float
    figures: Mapping[str, float]
    """By the names of the recipe's FIGURES."""
    perplexity: float | None
    """exp(loss), where the loss is that of tokens."""

    def as_event(self) -> dict[str, float | None]:
        return {"loss": self.loss, "perplexity": self.perplexity, **self.figures}


def perplexity(loss: float) -> float:
    """exp(loss), and the largest number that there is where it is larger."""
    return math.exp(min(loss, 709.0))


@dataclass(slots=True)
class History:
    """Which validation had the lowest loss, how many were since, and which checkpoint has the lowest one."""

    lowest: float | None = None
    step: int | None = None
    """Of the lowest one."""
    since: int = 0
    """Validations after it."""
    lowest_saved: float | None = None
    """Of all checkpoints."""

    def note(self, step: int, loss: float, *, min_delta: float) -> bool:
        """Take a validation. Returns whether its loss is lower than all before, by more than `min_delta`."""
        if self.lowest is None or loss < self.lowest - min_delta:
            self.lowest, self.step, self.since = loss, step, 0
            return True
        self.since += 1
        return False

    def note_saved(self, loss: float | None) -> bool:
        """Take a checkpoint. Returns whether it is the best one so far; one without a validation is not."""
        if loss is None or (self.lowest_saved is not None and loss >= self.lowest_saved):
            return False
        self.lowest_saved = loss
        return True

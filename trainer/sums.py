"""What a recipe says of a batch, and the loop of a step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sums:
    """Of one batch, on the device."""

    loss: Tensor
    """The sum that the gradient is of; a scalar."""
    figures: Tensor
    """(F,) fp32 without a gradient: the sums of the recipe's FIGURES."""


@dataclass(frozen=True, slots=True)
class Means:
    """Of one step, over its units."""

    loss: float
    grad_norm: float
    """Before clipping."""
    figures: dict[str, float]
    """By the names of FIGURES."""

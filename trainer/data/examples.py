"""What the model sees of a record. Torch-free."""

from __future__ import annotations

from array import array
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Example:
    """One conversation or text as token ids, with the positions whose tokens are trained."""

    ids: array[int]
    trained: array[int]
    """Positions in `ids` whose token is predicted and trained; never 0, which nothing precedes. Not empty."""
    lengths: array[int] | None = None
    """In a packed row the tokens of each of its examples, one after the other."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A preference: the same prompt with the answer that was chosen, and with the one that was not."""

    chosen: Example
    rejected: Example
    number: int = 0
    """Which pair of the data it is, whatever their order."""


Row = Example | Pair
"""What an epoch goes over."""


def num_tokens(row: Row) -> int:
    """Tokens of an example; of a pair those of the longer one."""
    if isinstance(row, Pair):
        return max(len(row.chosen.ids), len(row.rejected.ids))
    return len(row.ids)

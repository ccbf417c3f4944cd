"""What an epoch goes over, as sequences that read each row from the store when it is asked for. Torch-free."""

from __future__ import annotations

import random
from abc import abstractmethod
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import overload

import numpy as np
from numpy.typing import NDArray

from trainer.data.examples import Example, Pair, Row
from trainer.data.packing import join, pack
from trainer.data.store import TokenStore


class Rows(Sequence[Row]):
    """A sequence by `__len__` and `read`."""

    @abstractmethod
    def read(self, index: int) -> Row:
        """Row `index`, from 0."""

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self.read(one) for one in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.read(index % len(self))


@dataclass(frozen=True, eq=False)
class ExampleRows(Rows):
    store: TokenStore
    numbers: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.numbers)

    def read(self, index: int) -> Example:
        return self.store[int(self.numbers[index])]


@dataclass(frozen=True, eq=False)
class PairRows(Rows):
    """Pair n is the examples 2n and 2n + 1."""

    store: TokenStore
    numbers: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.numbers)

    def read(self, index: int) -> Pair:
        number = int(self.numbers[index])
        return Pair(self.store[2 * number], self.store[2 * number + 1], number)


class PackedRows(Rows):
    """Rows of at most `row_length` tokens, several examples in each."""

    def __init__(self, store: TokenStore, numbers: NDArray[np.int64], row_length: int) -> None:
        self._store = store
        order, self._starts = pack(store.lengths()[numbers], row_length)
        self._numbers = numbers[order]

    def __len__(self) -> int:
        return len(self._starts) - 1

    def read(self, index: int) -> Example:
        numbers = self._numbers[self._starts[index] : self._starts[index + 1]]
        return join([self._store[int(number)] for number in numbers])


class MixedRows(Rows):
    """Several sets of rows, each with how often one of its rows is seen in an epoch. As a sequence it is one epoch.

    A weight of 2.5 takes every row twice, and half of them, drawn anew for each epoch, once more.
    """

    def __init__(
        self, sets: Sequence[tuple[Sequence[Row], float]], drawn: Sequence[Sequence[int]] | None = None
    ) -> None:
        self._sets = sets
        self._sizes = [max(1, round(weight * len(rows))) for rows, weight in sets]
        self._ends = list(accumulate(self._sizes))
        self._drawn = drawn or self._draw(random.Random(0))

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, index: int) -> Row:
        place = bisect_right(self._ends, index)
        rows, _ = self._sets[place]
        offset = index - (self._ends[place] - self._sizes[place])
        whole = len(rows) * (self._sizes[place] // len(rows))
        return rows[offset % len(rows) if offset < whole else self._drawn[place][offset - whole]]

    def in_epoch(self, seed: int, epoch: int) -> MixedRows:
        """The rows of one epoch: always the same ones for a seed and an epoch."""
        return MixedRows(self._sets, self._draw(random.Random(f"{seed} {epoch}")))

    def _draw(self, generator: random.Random) -> list[Sequence[int]]:
        """For each set the rows that are seen once more than the others."""
        return [
            array("q", generator.sample(range(len(rows)), size % len(rows)))
            for (rows, _), size in zip(self._sets, self._sizes, strict=True)
        ]

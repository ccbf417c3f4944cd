"""Several examples in one row, each still alone with itself. Torch-free."""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trainer.data.examples import Example


def pack(lengths: NDArray[np.int64], row_length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which examples share a row of at most `row_length` tokens: best-fit decreasing.

    From the longest example to the shortest, each goes where it leaves the least room. Returns the examples' numbers
    row after row, within a row in their own order, and where each row starts among them, with the end as the last.
    Examples were cut to `row_length` before.
    """
    row_of = np.empty(len(lengths), np.int32)
    rows_with: dict[int, array[int]] = {}
    rooms: list[int] = []  # the keys of rows_with, sorted
    shortest, num_rows = int(lengths.min(initial=row_length)), 0
    for example in np.argsort(-lengths, kind="stable"):
        length = int(lengths[example])
        place = bisect_left(rooms, length)
        if place == len(rooms):
            row, room = num_rows, row_length
            num_rows += 1
        else:
            room = rooms[place]
            row = rows_with[room].pop()
            if not rows_with[room]:
                del rows_with[rooms.pop(place)]
        row_of[example] = row
        if room - length >= shortest:
            if room - length not in rows_with:
                rows_with[room - length] = array("i")
                insort(rooms, room - length)
            rows_with[room - length].append(row)
    starts = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=num_rows))])
    return np.argsort(row_of, kind="stable"), starts


def join(examples: Sequence[Example]) -> Example:
    """One row of several examples, whose `lengths` say where each ends."""
    ids, trained, lengths = array("i"), array("i"), array("i")
    for example in examples:
        trained.extend(len(ids) + position for position in example.trained)
        ids.extend(example.ids)
        lengths.append(len(example.ids))
    return Example(ids, trained, lengths)

"""Several examples in one row, each still alone with itself. Torch-free."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from trainer.data.examples import Example


def pack(examples: Sequence[Example], row_length: int) -> list[Example]:
    """Rows of at most `row_length` tokens, filled in order: a row ends where the next example does not fit.

    `lengths` of a row says where its examples end. Examples were cut to `row_length` before.
    """
    rows: list[Example] = []
    row: list[Example] = []
    filled = 0
    for example in examples:
        if row and filled + len(example.ids) > row_length:
            rows.append(_join(row))
            row, filled = [], 0
        row.append(example)
        filled += len(example.ids)
    return [*rows, _join(row)] if row else rows


def _join(examples: Sequence[Example]) -> Example:
    ids, trained, lengths = array("i"), array("i"), array("i")
    for example in examples:
        trained.extend(len(ids) + position for position in example.trained)
        ids.extend(example.ids)
        lengths.append(len(example.ids))
    return Example(ids, trained, lengths)

"""Examples in the order of one epoch, as padded tensors."""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.data.examples import Example, Pair, Row, num_tokens
from trainer.data.rows import MixedRows

PAD_TO_MULTIPLE_OF = 8
"""Few different shapes, and aligned ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Right padded. B rows, each a record or several packed ones, T tokens, N trained tokens; all tensors int64."""

    input_ids: Tensor  # (B, T)
    positions: Tensor  # (B, T), from 0 in each record
    documents: Tensor | None  # (B, T) in packed rows the number of each token's record; padding has one of its own
    target_rows: Tensor  # (N,) rows of the hidden states, as (B * T, H), that predict the trained tokens
    targets: Tensor  # (N,) the trained tokens
    num_tokens: int
    """Tokens without padding."""
    pairs: tuple[int, ...] = ()
    """The numbers of the pairs, where the batch is of pairs."""

    @property
    def num_trained(self) -> int:
        return self.targets.shape[0]

    def to(self, device: torch.device) -> Batch:
        return Batch(
            input_ids=self.input_ids.to(device),
            positions=self.positions.to(device),
            documents=None if self.documents is None else self.documents.to(device),
            target_rows=self.target_rows.to(device),
            targets=self.targets.to(device),
            num_tokens=self.num_tokens,
            pairs=self.pairs,
        )


def collate(rows: Sequence[Row]) -> Batch:
    """Pad to the longest, and find the trained tokens here, so that the device never has to look for them.

    Of pairs the chosen ones come first, then the rejected ones in the same order: B is twice their number.
    """
    examples = _examples(rows)
    packed = any(example.lengths is not None for example in examples)
    longest = max(len(example.ids) for example in examples)
    width = math.ceil(longest / PAD_TO_MULTIPLE_OF) * PAD_TO_MULTIPLE_OF
    predictors = [row * width + position - 1 for row, example in enumerate(examples) for position in example.trained]
    targets = [example.ids[position] for example in examples for position in example.trained]
    return Batch(
        input_ids=torch.tensor([[*example.ids, *[0] * (width - len(example.ids))] for example in examples]),
        positions=torch.arange(width).repeat(len(examples), 1) if not packed else _positions(examples, width),
        documents=_documents(examples, width) if packed else None,
        target_rows=torch.tensor(predictors),
        targets=torch.tensor(targets),
        num_tokens=sum(len(example.ids) for example in examples),
        pairs=tuple(row.number for row in rows if isinstance(row, Pair)),
    )


def _examples(rows: Sequence[Row]) -> list[Example]:
    pairs = [row for row in rows if isinstance(row, Pair)]
    alone = [row for row in rows if isinstance(row, Example)]
    return [*alone, *(pair.chosen for pair in pairs), *(pair.rejected for pair in pairs)]


def _positions(examples: Sequence[Example], width: int) -> Tensor:
    return torch.stack([torch.cat([torch.arange(length) for length in _lengths(row, width)]) for row in examples])


def _documents(examples: Sequence[Example], width: int) -> Tensor:
    lengths = [torch.tensor(_lengths(row, width)) for row in examples]
    return torch.stack([torch.arange(len(counts)).repeat_interleave(counts) for counts in lengths])


def _lengths(row: Example, width: int) -> list[int]:
    """Tokens of each document of a row, the padding being the last."""
    return [*(row.lengths or [len(row.ids)]), width - len(row.ids)]


def epoch_steps(
    rows: Sequence[Row], *, batch_size: int, accumulation: int, seed: int, epoch: int, first_step: int = 0
) -> Iterator[list[Batch]]:
    """For each optimizer step of an epoch its batches; every row once, in an order drawn from seed and epoch.

    Rows of one step are sorted by length before they are divided into batches: less padding, same sum of gradients.
    The last step takes what is left, and the last batch may be short. Steps before `first_step`, counted from 0, are
    left out; the others are as without it. `batch_size` counts rows: a batch of pairs has twice as many.
    """
    if isinstance(rows, MixedRows):
        rows = rows.in_epoch(seed, epoch)
    order = array("q", range(len(rows)))
    random.Random(seed * 1_000_003 + epoch).shuffle(order)
    order.reverse()  # the order of random.sample, which needs the memory of several lists for it
    rows_per_step = batch_size * accumulation
    for start in range(first_step * rows_per_step, len(order), rows_per_step):
        step = [rows[index] for index in order[start : start + rows_per_step]]
        yield list(in_batches(sorted(step, key=num_tokens), batch_size))


def in_batches(rows: Sequence[Row], batch_size: int) -> Iterator[Batch]:
    for start in range(0, len(rows), batch_size):
        yield collate(rows[start : start + batch_size])

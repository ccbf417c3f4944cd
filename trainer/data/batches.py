"""Examples in the order of one epoch, as padded tensors."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.data.dataset import Example

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
        )


def collate(examples: Sequence[Example]) -> Batch:
    """Pad to the longest, and find the trained tokens here, so that the device never has to look for them."""
    packed = any(example.lengths is not None for example in examples)
    longest = max(len(example.ids) for example in examples)
    width = math.ceil(longest / PAD_TO_MULTIPLE_OF) * PAD_TO_MULTIPLE_OF
    rows = [row * width + position - 1 for row, example in enumerate(examples) for position in example.trained]
    targets = [example.ids[position] for example in examples for position in example.trained]
    return Batch(
        input_ids=torch.tensor([[*example.ids, *[0] * (width - len(example.ids))] for example in examples]),
        positions=torch.arange(width).repeat(len(examples), 1) if not packed else _positions(examples, width),
        documents=_documents(examples, width) if packed else None,
        target_rows=torch.tensor(rows),
        targets=torch.tensor(targets),
        num_tokens=sum(len(example.ids) for example in examples),
    )


def _positions(examples: Sequence[Example], width: int) -> Tensor:
    return torch.stack([torch.cat([torch.arange(length) for length in _lengths(row, width)]) for row in examples])


def _documents(examples: Sequence[Example], width: int) -> Tensor:
    lengths = [torch.tensor(_lengths(row, width)) for row in examples]
    return torch.stack([torch.arange(len(counts)).repeat_interleave(counts) for counts in lengths])


def _lengths(row: Example, width: int) -> list[int]:
    """Tokens of each document of a row, the padding being the last."""
    return [*(row.lengths or [len(row.ids)]), width - len(row.ids)]


def steps_per_epoch(num_examples: int, *, batch_size: int, accumulation: int) -> int:
    return math.ceil(num_examples / (batch_size * accumulation))


def epoch_steps(
    examples: Sequence[Example], *, batch_size: int, accumulation: int, seed: int, epoch: int
) -> Iterator[list[Batch]]:
    """For each optimizer step of an epoch its batches; every example once, in an order drawn from seed and epoch.

    Examples of one step are sorted by length before they are divided into batches: less padding, same sum of
    gradients. The last step takes what is left, and the last batch may be short.
    """
    order = random.Random(seed * 1_000_003 + epoch).sample(range(len(examples)), len(examples))
    for start in range(0, len(order), batch_size * accumulation):
        step = [examples[index] for index in order[start : start + batch_size * accumulation]]
        yield list(in_batches(sorted(step, key=lambda example: len(example.ids)), batch_size))


def in_batches(examples: Sequence[Example], batch_size: int) -> Iterator[Batch]:
    for start in range(0, len(examples), batch_size):
        yield collate(examples[start : start + batch_size])

"""The input of a step as one array of int32 words: how it is divided, and how it gets to the device.

Legend: B rows, T tokens a row, M blocks a row, S rows that sample, E edits, K masks.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence as Items
from dataclasses import dataclass
from functools import lru_cache
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from service.engine.rows import Words

ArrayT = TypeVar("ArrayT")


class Sections(NamedTuple, Generic[ArrayT]):
    """The input of one forward: parts of one array, on the host or on the device."""

    tokens: ArrayT  # (3 * B * T,) ids, positions, slots
    table: ArrayT  # (B * M,)
    last: ArrayT  # (S,) index of the row's last token among B * T
    sampling: ArrayT  # (5 * S,) temperature, top_k, top_p, min_p, uniform; all but top_k the bits of an fp32
    edits: ArrayT  # (3 * E,) index, and the bits of divisor and addend
    mask_rows: ArrayT  # (S,) or nothing without masks
    targets: ArrayT  # (B * T,) the token after each, or nothing without log probabilities of the prompt


@dataclass(frozen=True, slots=True)
class Shape:
    """The padded size of one forward."""

    rows: int
    tokens: int
    blocks: int
    samples: int
    edits: int
    masks: int
    has_targets: bool


@lru_cache(maxsize=4096)
def section_sizes(shape: Shape) -> tuple[int, ...]:
    """Words of each section."""
    num_tokens = shape.rows * shape.tokens
    return (
        3 * num_tokens,
        shape.rows * shape.blocks,
        shape.samples,
        5 * shape.samples,
        3 * shape.edits,
        shape.samples if shape.masks else 0,
        num_tokens if shape.has_targets else 0,
    )


def divide(words: Words, sizes: Items[int]) -> list[Words]:
    """Parts that follow each other; np.split takes ten times as long."""
    parts, begin = [], 0
    for size in sizes:
        parts.append(words[begin : begin + size])
        begin += size
    return parts


def padded_sizes(limit: int) -> tuple[int, ...]:
    """1, 2, 3, 4, 6, 8, 12, 16 ... up to `limit` and with it: padding is never more than half of what is needed."""
    sizes = {limit, 1}
    power = 2
    while power < limit:
        sizes |= {power, min(limit, power + power // 2)}
        power *= 2
    return tuple(sorted(sizes))


def round_up(count: int, sizes: tuple[int, ...]) -> int:
    """The smallest of `sizes` that is enough; none is none."""
    return sizes[bisect_left(sizes, count)] if count else 0


def power_of_two(count: int) -> int:
    """The smallest one that is enough; none is none."""
    return 1 << (count - 1).bit_length() if count else 0


class Buffer:
    """Words on the host and on the device at addresses that stay, until a step needs more than any before it."""

    def __init__(self, device: torch.device, num_words: int) -> None:
        self._device = device
        self._allocate(num_words)

    def clear(self, num_words: int) -> Words:
        """So many words of zeros to write to."""
        if num_words > len(self._host):
            self._allocate(power_of_two(num_words))
        words = self._words[:num_words]
        words.fill(0)
        return words

    def upload(self, begin: int, end: int) -> Tensor:
        """These words on the device, by one copy."""
        part = self.uploaded(begin, end)
        if self._input is not self._host:
            part.copy_(self._host[begin:end])
        return part

    def uploaded(self, begin: int, end: int) -> Tensor:
        """These words on the device, as they were uploaded."""
        return self._input[begin:end]

    def _allocate(self, num_words: int) -> None:
        self._host = torch.zeros(num_words, dtype=torch.int32)
        self._words: Words = self._host.numpy()
        self._input = self._host if self._device.type == "cpu" else torch.zeros_like(self._host, device=self._device)

"""The input of a step as one array of int32 words: how it is divided, and how it gets to the device.

Legend: B rows, T tokens a row, M blocks a row, S rows that sample, E edits, K masks.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from functools import lru_cache
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from service.engine.edits import Words
from service.engine.sampler import EditInputs, SamplingInputs

ArrayT = TypeVar("ArrayT", Words, Tensor)

MAX_FRAMES = 1024


class Shape(NamedTuple):
    """The padded size of one forward."""

    rows: int
    tokens: int
    blocks: int
    samples: int
    edits: int
    masks: int
    has_targets: bool


class Fields(NamedTuple, Generic[ArrayT]):
    """The input of one forward: parts of one array, on the host or on the device."""

    tokens: ArrayT  # (3, B, T) ids, positions, slots
    table: ArrayT  # (B, M)
    last: ArrayT  # (S,) index of the row's last token among B * T
    sampling: ArrayT  # (5, S) temperature, top_k, top_p, min_p, uniform; all but top_k the bits of an fp32
    edits: ArrayT  # (3, E) index, and the bits of divisor and addend
    mask_rows: ArrayT  # (S,) which mask is the row's, or nothing without masks
    targets: ArrayT  # (B, T) the token after each, or nothing without log probabilities of the prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """The input of one forward at a place in the buffer. Its views serve every step with the same shape there."""

    host: Fields[Words]
    device: Fields[Tensor]
    ids: Tensor  # (B, T)
    positions: Tensor  # (B, T)
    slots: Tensor  # (B * T,)
    sampling: SamplingInputs
    edits: EditInputs


@lru_cache(maxsize=MAX_FRAMES)
def num_words(shape: Shape) -> int:
    """Of one forward, without its masks."""
    return sum(rows * columns for rows, columns in _field_shapes(shape))


def _field_shapes(shape: Shape) -> tuple[tuple[int, int], ...]:
    return (
        (3 * shape.rows, shape.tokens),
        (shape.rows, shape.blocks),
        (1, shape.samples),
        (5, shape.samples),
        (3, shape.edits),
        (1, shape.samples if shape.masks else 0),
        (shape.rows if shape.has_targets else 0, shape.tokens),
    )


def _divide(words: ArrayT, shape: Shape) -> Fields[ArrayT]:
    parts: list[ArrayT] = []
    begin = 0
    for rows, columns in _field_shapes(shape):
        parts.append(words[begin : begin + rows * columns].reshape(rows, columns))
        begin += rows * columns
    tokens, table, last, sampling, edits, mask_rows, targets = parts
    tokens = tokens.reshape(3, shape.rows, shape.tokens)
    return Fields(tokens, table, last.reshape(-1), sampling, edits, mask_rows.reshape(-1), targets)


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
        self._frames: dict[tuple[int, Shape], Frame] = {}
        self._allocate(num_words)

    def clear(self, num_words: int) -> Words:
        """So many words of zeros to write to."""
        if num_words > len(self._host):
            self._allocate(power_of_two(num_words))
        words = self._words[:num_words]
        words.fill(0)
        return words

    def frame(self, begin: int, shape: Shape) -> Frame:
        """Within the words that were cleared."""
        key = (begin, shape)
        frame = self._frames.get(key)
        if frame is None:
            if len(self._frames) == MAX_FRAMES:
                self._frames.clear()
            frame = self._frames[key] = self._make_frame(begin, shape)
        return frame

    def upload(self, begin: int, end: int) -> None:
        """Copy these words to the device, by one copy."""
        if self._input is not self._host:
            self._input[begin:end].copy_(self._host[begin:end])

    def uploaded(self, begin: int, end: int) -> Tensor:
        """These words on the device."""
        return self._input[begin:end]

    def _make_frame(self, begin: int, shape: Shape) -> Frame:
        part = slice(begin, begin + num_words(shape))
        device = _divide(self._input[part], shape)
        ids, positions, slots = device.tokens.unbind(0)
        temperature, top_k, top_p, min_p, uniform = device.sampling.unbind(0)
        index, divisor, addend = device.edits.unbind(0)
        return Frame(
            host=_divide(self._words[part], shape),
            device=device,
            ids=ids,
            positions=positions,
            slots=slots.reshape(-1),
            sampling=SamplingInputs(
                temperature=temperature.view(torch.float32),
                top_k=top_k,
                top_p=top_p.view(torch.float32),
                min_p=min_p.view(torch.float32),
                uniform=uniform.view(torch.float32),
            ),
            edits=EditInputs(index=index, divisor=divisor.view(torch.float32), addend=addend.view(torch.float32)),
        )

    def _allocate(self, num_words: int) -> None:
        self._frames.clear()
        self._host = torch.zeros(num_words, dtype=torch.int32)
        self._words: Words = self._host.numpy()
        self._input = self._host if self._device.type == "cpu" else torch.zeros_like(self._host, device=self._device)

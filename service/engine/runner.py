"""Runs the model over the chunks of a step and samples. The only part of the engine that computes on the device.

A step is one upload of int32 words, the forwards, the sampler, and one download of the sampled ids; nothing between
waits for the device. Shapes are padded to a few sizes, so that each could be captured as a graph.
Legend: B rows, T tokens a row, M blocks a row.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lm.cache import KVCache, PagedBatch
from lm.model import CausalLM
from service.engine.blocks import blocks_for
from service.engine.messages import Logprobs
from service.engine.sampler import SamplingInputs, plan_sampling, sample, uniform
from service.engine.sequence import Chunk

Words = NDArray[np.int32]
ArrayT = TypeVar("ArrayT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward:
    """Chunks that go through one set of weights together: one token of each, or one chunk of several tokens."""

    model: CausalLM
    chunks: tuple[Chunk, ...]


class ForwardFigures(NamedTuple):
    """What one forward did."""

    generation: int
    num_rows: int
    num_tokens: int
    """Of all rows, without padding."""
    seconds: float
    """On a device that runs behind the host, its part of the step's time in the proportion of the launches."""

    @property
    def is_decode(self) -> bool:
        """One token a row."""
        return self.num_tokens == self.num_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    token_ids: list[int]
    """One for each chunk that samples, in order."""
    logprobs: list[Logprobs | None]
    """Of each of `token_ids`, where they are asked for."""
    prompt_logprobs: dict[int, tuple[Logprobs, ...]]
    """By index of the chunk: of the prompt's tokens that follow those of the chunk."""
    forwards: list[ForwardFigures]


class Sections(NamedTuple, Generic[ArrayT]):
    """The input of one forward: parts of one array of int32 words, on the host or on the device."""

    ids: ArrayT  # (B * T,)
    positions: ArrayT  # (B * T,)
    slots: ArrayT  # (B * T,)
    table: ArrayT  # (B * M,)
    last: ArrayT  # (B,) index of the row's last token among B * T
    temperature: ArrayT  # (B,) the bits of an fp32
    top_k: ArrayT  # (B,)
    top_p: ArrayT  # (B,) the bits of an fp32
    uniform: ArrayT  # (B,) the bits of an fp32


@dataclass(frozen=True, slots=True)
class Shape:
    """The padded size of one forward."""

    rows: int
    tokens: int
    blocks: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """Words of each section."""
        return (self.rows * self.tokens,) * 3 + (self.rows * self.blocks,) + (self.rows,) * 5

    @property
    def num_words(self) -> int:
        return sum(self.sizes)


def padded_sizes(limit: int) -> tuple[int, ...]:
    """1, 2, 3, 4, 6, 8, 12, 16 ... up to `limit` and with it: padding is never more than half of what is needed."""
    sizes = {limit, 1}
    power = 2
    while power < limit:
        sizes |= {power, min(limit, power + power // 2)}
        power *= 2
    return tuple(sorted(sizes))


class Runner:
    def __init__(
        self,
        cache: KVCache,
        device: torch.device,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
    ) -> None:
        self._cache = cache
        self._row_sizes = padded_sizes(max_num_seqs)
        self._token_sizes = padded_sizes(max(max_num_batched_tokens, cache.block_size))
        self._block_sizes = padded_sizes(blocks_for(max_model_len, cache.block_size))
        self._device = device

    @torch.inference_mode()
    def run(self, chunks: Items[Chunk], model_of: Callable[[int], CausalLM]) -> Output:
        """Compute the chunks' keys and values, and sample where a chunk says so. `model_of` knows the generations."""
        forwards = _group(chunks, model_of)
        marks = [time.perf_counter()]
        shapes = [self._shape(forward.chunks) for forward in forwards]
        inputs = self._upload(forwards, shapes)
        sampled: list[Tensor] = []
        for forward, shape, words in zip(forwards, shapes, inputs, strict=True):
            sampled += self._forward(forward, shape, Sections(*words.split(shape.sizes)))
            marks.append(time.perf_counter())
        token_ids = torch.cat(sampled).tolist() if sampled else []
        scale = (time.perf_counter() - marks[0]) / (marks[-1] - marks[0])
        seconds = [(end - begin) * scale for begin, end in pairwise(marks)]
        return Output(
            token_ids=token_ids,
            logprobs=[None] * len(token_ids),
            prompt_logprobs={},
            forwards=[_figures(*pair) for pair in zip(forwards, seconds, strict=True)],
        )

    def _shape(self, chunks: tuple[Chunk, ...]) -> Shape:
        num_tokens = max(chunk.end - chunk.start for chunk in chunks)
        num_blocks = max(blocks_for(chunk.end, self._cache.block_size) for chunk in chunks)
        return Shape(
            _round_up(len(chunks), self._row_sizes),
            _round_up(num_tokens, self._token_sizes),
            _round_up(num_blocks, self._block_sizes),
        )

    def _upload(self, forwards: Items[Forward], shapes: Items[Shape]) -> tuple[Tensor, ...]:
        """The words of each forward on the device, by one copy."""
        num_words = [shape.num_words for shape in shapes]
        host = torch.zeros(sum(num_words), dtype=torch.int32)
        for forward, shape, words in zip(forwards, shapes, host.split(num_words), strict=True):
            self._write(words.numpy(), shape, forward.chunks)
        parts: tuple[Tensor, ...] = host.to(self._device).split(num_words)
        return parts

    def _write(self, words: Words, shape: Shape, chunks: tuple[Chunk, ...]) -> None:
        words.fill(0)
        sections = Sections(*np.split(words, np.cumsum(shape.sizes)[:-1]))
        temperature, top_p, uniforms = (
            section.view(np.float32) for section in (sections.temperature, sections.top_p, sections.uniform)
        )
        block_size = self._cache.block_size
        for row, chunk in enumerate(chunks):
            start, end, sequence = chunk.start, chunk.end, chunk.sequence
            first, num_blocks = row * shape.tokens, blocks_for(end, block_size)
            tokens = slice(first, first + end - start)
            positions = np.arange(start, end, dtype=np.int32)
            blocks = np.array(sequence.blocks[:num_blocks], dtype=np.int32)
            sections.ids[tokens] = sequence.token_ids[start:end]
            sections.positions[tokens] = positions
            sections.slots[tokens] = blocks[positions // block_size] * block_size + positions % block_size
            sections.table[row * shape.blocks : row * shape.blocks + num_blocks] = blocks
            sections.last[row] = tokens.stop - 1
            sections.top_k[row] = sequence.sampling.top_k
            temperature[row] = sequence.sampling.temperature
            top_p[row] = sequence.sampling.top_p
            uniforms[row] = uniform(sequence.seed, end)

    def _forward(self, forward: Forward, shape: Shape, words: Sections[Tensor]) -> list[Tensor]:
        """Sampled ids (number of chunks,), or nothing where the chunks do not sample."""
        table = words.table.view(shape.rows, shape.blocks)
        paged = PagedBatch(cache=self._cache, slot_mapping=words.slots, block_table=table)
        grid = (shape.rows, shape.tokens)
        hidden = forward.model(words.ids.view(grid), words.positions.view(grid), paged).flatten(0, 1)  # (B * T, W)
        if not forward.chunks[0].samples:
            return []
        if shape.tokens > 1:
            hidden = hidden.index_select(0, words.last)
        inputs = SamplingInputs(
            temperature=words.temperature.view(torch.float32),
            top_k=words.top_k,
            top_p=words.top_p.view(torch.float32),
            uniform=words.uniform.view(torch.float32),
        )
        logits = forward.model.logits(hidden)
        plan = plan_sampling((chunk.sequence.sampling for chunk in forward.chunks), logits.shape[-1])
        return [sample(logits, inputs, plan)[: len(forward.chunks)]]


def _group(chunks: Items[Chunk], model_of: Callable[[int], CausalLM]) -> list[Forward]:
    """Chunks of one token go through the weights of their generation together, longer ones by themselves."""
    singles: dict[int, list[Chunk]] = {}
    for chunk in chunks:
        if chunk.end - chunk.start == 1:
            singles.setdefault(_generation(chunk), []).append(chunk)
    forwards = [Forward(model=model_of(generation), chunks=tuple(group)) for generation, group in singles.items()]
    longer = [chunk for chunk in chunks if chunk.end - chunk.start > 1]
    return forwards + [Forward(model=model_of(_generation(chunk)), chunks=(chunk,)) for chunk in longer]


def _generation(chunk: Chunk) -> int:
    assert chunk.sequence.generation is not None
    return chunk.sequence.generation


def _figures(forward: Forward, seconds: float) -> ForwardFigures:
    num_tokens = sum(chunk.end - chunk.start for chunk in forward.chunks)
    return ForwardFigures(_generation(forward.chunks[0]), len(forward.chunks), num_tokens, seconds)


def _round_up(count: int, sizes: tuple[int, ...]) -> int:
    return sizes[bisect_left(sizes, count)]

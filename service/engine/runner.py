"""Runs the model over the chunks of a step and samples. The only part of the engine that computes on the device.

A step is one upload of int32 words, the forwards, the sampler, and one download of the sampled ids; nothing between
waits for the device. Shapes are padded to a few sizes, so that each could be captured as a graph.
Legend: B rows, T tokens a row, M blocks a row.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Sequence as Items
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lm.cache import KVCache, PagedBatch
from lm.model import LlamaForCausalLM
from service.engine.blocks import blocks_for
from service.engine.sampler import SamplingInputs, plan_sampling, sample, uniform
from service.engine.scheduler import Chunk

Words = NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward:
    """Chunks that go through one set of weights together: one token of each, or one chunk of several tokens."""

    model: LlamaForCausalLM
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    token_ids: list[int]
    """One for each chunk that samples, in order."""
    seconds: list[float]
    """Per forward. On a device that runs behind the host, the step's time in the proportion of the launches."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The padded size of one forward."""

    rows: int
    tokens: int
    blocks: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """Words of: ids, positions, slots (B * T); table (B * M); last token, temperature, top-k, top-p, uniform (B)."""
        num_tokens = self.rows * self.tokens
        return (num_tokens, num_tokens, num_tokens, self.rows * self.blocks) + (self.rows,) * 5


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
        self, cache: KVCache, device: torch.device, *, max_num_seqs: int, prefill_chunk: int, max_model_len: int
    ) -> None:
        self._cache = cache
        self._device = device
        self._row_sizes = padded_sizes(max_num_seqs)
        self._token_sizes = padded_sizes(prefill_chunk)
        self._block_sizes = padded_sizes(blocks_for(max_model_len, cache.block_size))
        max_blocks = self._block_sizes[-1]
        # Each row of a decode batch may use weights of its own, and none is padded to more than twice its number
        num_words = sum(Shape(2 * max_num_seqs, 1, max_blocks).sizes) + sum(Shape(1, prefill_chunk, max_blocks).sizes)
        self._host = torch.zeros(num_words, dtype=torch.int32)
        self._words = self._host.numpy()
        self._input = self._host if device.type == "cpu" else torch.zeros_like(self._host, device=device)

    @torch.inference_mode()
    def run(self, forwards: Items[Forward]) -> Output:
        """Compute the chunks' keys and values, and sample where a chunk says so."""
        begin = time.perf_counter()
        shapes = [self._shape(forward.chunks) for forward in forwards]
        offsets = np.cumsum([0] + [sum(shape.sizes) for shape in shapes]).tolist()
        for forward, shape, offset in zip(forwards, shapes, offsets, strict=False):
            self._write(self._words[offset : offset + sum(shape.sizes)], shape, forward.chunks)
        if self._input is not self._host:
            self._input[: offsets[-1]].copy_(self._host[: offsets[-1]])
        sampled: list[Tensor] = []
        marks = [begin]
        for forward, shape, offset in zip(forwards, shapes, offsets, strict=False):
            sampled += self._forward(forward, shape, offset)
            marks.append(time.perf_counter())
        token_ids = torch.cat(sampled).tolist() if sampled else []
        scale = (time.perf_counter() - begin) / (marks[-1] - begin)
        seconds = [(end - start) * scale for start, end in pairwise(marks)]
        return Output(token_ids=token_ids, seconds=seconds)

    def _shape(self, chunks: tuple[Chunk, ...]) -> Shape:
        num_tokens = max(chunk.end - chunk.start for chunk in chunks)
        num_blocks = max(blocks_for(chunk.end, self._cache.block_size) for chunk in chunks)
        return Shape(
            _round_up(len(chunks), self._row_sizes),
            _round_up(num_tokens, self._token_sizes),
            _round_up(num_blocks, self._block_sizes),
        )

    def _write(self, words: Words, shape: Shape, chunks: tuple[Chunk, ...]) -> None:
        words.fill(0)
        ids, positions, slots, table, last, temperature, top_k, top_p, uniforms = _split(words, shape)
        for row, chunk in enumerate(chunks):
            start, end, sequence = chunk.start, chunk.end, chunk.sequence
            begin, num_tokens, num_blocks = row * shape.tokens, end - start, blocks_for(end, self._cache.block_size)
            position = np.arange(start, end, dtype=np.int32)
            blocks = np.array(sequence.blocks[:num_blocks], dtype=np.int32)
            block, offset = np.divmod(position, np.int32(self._cache.block_size))
            ids[begin : begin + num_tokens] = sequence.token_ids[start:end]
            positions[begin : begin + num_tokens] = position
            slots[begin : begin + num_tokens] = blocks[block] * self._cache.block_size + offset
            table[row * shape.blocks : row * shape.blocks + num_blocks] = blocks
            last[row] = begin + num_tokens - 1
            temperature.view(np.float32)[row] = sequence.sampling.temperature
            top_k[row] = sequence.sampling.top_k
            top_p.view(np.float32)[row] = sequence.sampling.top_p
            uniforms.view(np.float32)[row] = uniform(sequence.seed, end)

    def _forward(self, forward: Forward, shape: Shape, offset: int) -> list[Tensor]:
        """Sampled ids (number of chunks,), or nothing where the chunks do not sample."""
        words = self._input[offset : offset + sum(shape.sizes)].split(shape.sizes)
        ids, positions, slots, table, last, temperature, top_k, top_p, uniforms = words
        paged = PagedBatch(cache=self._cache, slot_mapping=slots, block_table=table.view(shape.rows, shape.blocks))
        grid = (shape.rows, shape.tokens)
        hidden = forward.model(ids.view(grid), positions.view(grid), paged).flatten(0, 1)  # (B * T, W)
        if not forward.chunks[0].samples:
            return []
        if shape.tokens > 1:
            hidden = hidden.index_select(0, last)
        inputs = SamplingInputs(
            temperature=temperature.view(torch.float32),
            top_k=top_k,
            top_p=top_p.view(torch.float32),
            uniform=uniforms.view(torch.float32),
        )
        logits = forward.model.logits(hidden)
        plan = plan_sampling((chunk.sequence.sampling for chunk in forward.chunks), logits.shape[-1])
        return [sample(logits, inputs, plan)[: len(forward.chunks)]]


def _round_up(count: int, sizes: tuple[int, ...]) -> int:
    return sizes[bisect_left(sizes, count)]


def _split(words: Words, shape: Shape) -> list[Words]:
    return np.split(words, np.cumsum(shape.sizes)[:-1])

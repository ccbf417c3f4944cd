"""The chunks of a step, grouped into forwards, and what each forward's words say. Computes nothing.

A few numpy calls a forward and about a microsecond a chunk: this is what the host does while the device waits.
Legend: B rows, T tokens a row, S rows that sample.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.engine.blocks import blocks_for
from service.engine.edits import TokenEdits
from service.engine.logprobs import top_size
from service.engine.random_numbers import uniforms
from service.engine.rows import DRAWS, EDITS, LOGPROBS, MASK, MIN_P, Rows, Words
from service.engine.sampler import SamplingPlan
from service.engine.sequence import Chunk
from service.engine.words import Sections, Shape, padded_sizes, power_of_two, round_up

Integers = NDArray[np.int32]

FEWEST_EDITS = 64
"""Room that edits take at least, so that a growing answer changes the shape seldom."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """The padded sizes that occur."""

    rows: tuple[int, ...]
    tokens: tuple[int, ...]
    blocks: tuple[int, ...]
    block_size: int
    vocab_size: int

    @classmethod
    def up_to(
        cls, *, max_num_seqs: int, max_chunk_tokens: int, max_model_len: int, block_size: int, vocab_size: int
    ) -> Sizes:
        return cls(
            rows=padded_sizes(max_num_seqs),
            tokens=padded_sizes(max_chunk_tokens),
            blocks=padded_sizes(blocks_for(max_model_len, block_size)),
            block_size=block_size,
            vocab_size=vocab_size,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The chunks of one forward."""

    generation: int
    chunks: list[Chunk]
    places: list[int]
    """Where the chunks stand in the step."""
    rows: NDArray[np.intp]  # (B,) of `Rows`
    starts: Integers  # (B,)
    ends: Integers  # (B,)
    sampling: list[int]
    """Which of the chunks sample."""
    shape: Shape
    plan: SamplingPlan
    num_logprobs: int | None
    """How many of the likeliest tokens come with each sampled one; None is no log probability at all."""
    num_prompt_logprobs: int | None
    edited: list[tuple[int, TokenEdits, int]]
    """Among those that sample: which one, its edits, and how many these are."""
    masked: list[int]
    """Among those that sample: which ones have a mask."""

    @property
    def is_dense(self) -> bool:
        """One token in each row, and every row samples."""
        return self.shape.tokens == 1 and len(self.sampling) == len(self.chunks)


def group(chunks: Items[Chunk], sizes: Sizes) -> list[list[int]]:
    """Places of the chunks that go through one forward: the same weights, the same padded number of tokens, and log
    probabilities of the prompt for all or none."""
    groups: dict[tuple[int | None, int, bool], list[int]] = {}
    for place, chunk in enumerate(chunks):
        sequence, num_tokens = chunk.sequence, chunk.end - chunk.start
        padded = 1 if num_tokens == 1 else round_up(num_tokens, sizes.tokens)
        key = (sequence.generation, padded, _wants_prompt_logprobs(chunk))
        if key in groups:
            groups[key].append(place)
        else:
            groups[key] = [place]
    return list(groups.values())


def _wants_prompt_logprobs(chunk: Chunk) -> bool:
    sequence = chunk.sequence
    return sequence.sampling.prompt_logprobs is not None and chunk.start + 1 < sequence.num_prompt_tokens


def plan_batch(step: Items[Chunk], places: list[int], rows: Rows, sizes: Sizes) -> Batch:
    chunks = [step[place] for place in places]
    generation = chunks[0].sequence.generation
    assert generation is not None
    indices = np.array([chunk.sequence.row for chunk in chunks], dtype=np.intp)
    ends = np.array([chunk.end for chunk in chunks], dtype=np.int32)
    starts = np.array([chunk.start for chunk in chunks], dtype=np.int32)
    sampling = [index for index, chunk in enumerate(chunks) if chunk.samples]
    sampled = indices if len(sampling) == len(chunks) else indices[sampling]
    needs = int(np.bitwise_or.reduce(rows.needs[sampled])) if sampling else 0
    edited = _edited(chunks, sampling, rows) if needs & EDITS else []
    masked = _masked(sampled, rows) if needs & MASK else []
    prompt_tops = [chunk.sequence.sampling.prompt_logprobs for chunk in chunks if _wants_prompt_logprobs(chunk)]
    tops = [chunks[index].sequence.sampling.logprobs for index in sampling] if needs & LOGPROBS else []
    return Batch(
        generation=generation,
        chunks=chunks,
        places=places,
        rows=indices,
        starts=starts,
        ends=ends,
        sampling=sampling,
        shape=Shape(
            rows=round_up(len(chunks), sizes.rows),
            tokens=round_up(int((ends - starts).max()), sizes.tokens),
            blocks=round_up(blocks_for(int(ends.max()), sizes.block_size), sizes.blocks),
            samples=round_up(len(sampling), sizes.rows),
            edits=max(FEWEST_EDITS, power_of_two(sum(size for _, _, size in edited))) if edited else 0,
            masks=power_of_two(1 + len(masked)) if masked else 0,
            has_targets=bool(prompt_tops),
        ),
        plan=SamplingPlan(
            is_greedy=not needs & DRAWS,
            num_candidates=int(rows.num_candidates[sampled].max()) if needs & DRAWS else 0,
            has_min_p=bool(needs & MIN_P),
        ),
        num_logprobs=_most(tops, sizes),
        num_prompt_logprobs=_most(prompt_tops, sizes),
        edited=edited,
        masked=masked,
    )


def _most(tops: Iterable[int | None], sizes: Sizes) -> int | None:
    most = max((-1 if top is None else top for top in tops), default=-1)
    return None if most < 0 else top_size(most, sizes.vocab_size)


def _edited(chunks: list[Chunk], sampling: list[int], rows: Rows) -> list[tuple[int, TokenEdits, int]]:
    edited = []
    for row, index in enumerate(sampling):
        sequence = chunks[index].sequence
        assert sequence.row is not None
        edits = rows.edits[sequence.row]
        if edits is not None and (size := edits.advance(sequence.token_ids)):
            edited.append((row, edits, size))
    return edited


def _masked(sampled: NDArray[np.intp], rows: Rows) -> list[int]:
    masked: list[int] = np.flatnonzero(rows.needs[sampled] & MASK).tolist()
    return masked


def write_words(batch: Batch, sections: Sections[Words], rows: Rows, sizes: Sizes) -> None:
    """Fill the words of one forward, which are zero before."""
    _write_tokens(batch, sections, rows, sizes.block_size)
    if batch.shape.has_targets:
        _write_targets(batch, sections.targets)
    if batch.sampling:
        _write_sampling(batch, sections, rows)
    if batch.edited:
        _write_edits(batch, sections.edits.reshape(3, -1), sizes.vocab_size)
    if batch.masked:
        sections.mask_rows[batch.masked] = np.arange(1, len(batch.masked) + 1)


def _write_tokens(batch: Batch, sections: Sections[Words], rows: Rows, block_size: int) -> None:
    num_rows, shape = len(batch.chunks), batch.shape
    ids, positions, slots = sections.tokens.reshape(3, shape.rows, shape.tokens)[:, :num_rows]
    if shape.tokens == 1:
        ids[:, 0] = [chunk.sequence.token_ids[chunk.start] for chunk in batch.chunks]
    else:
        for row, (sequence, start, end, _) in enumerate(batch.chunks):
            ids[row, : end - start] = sequence.token_ids[start:end]
    offsets = np.arange(shape.tokens, dtype=np.int32)
    is_token = offsets < (batch.ends - batch.starts)[:, None]
    positions[:] = (batch.starts[:, None] + offsets) * is_token
    index, offset = np.divmod(positions, block_size)
    slots[:] = (rows.table[batch.rows[:, None], index] * block_size + offset) * is_token
    sections.table.reshape(shape.rows, shape.blocks)[:num_rows] = rows.table[batch.rows, : shape.blocks]


def _write_targets(batch: Batch, targets: Words) -> None:
    grid = targets.reshape(batch.shape.rows, batch.shape.tokens)
    for row, chunk in enumerate(batch.chunks):
        following = following_tokens(chunk)
        grid[row, : len(following)] = following


def following_tokens(chunk: Chunk) -> list[int]:
    """The tokens of the prompt that stand after those of the chunk, each after its own."""
    return chunk.sequence.token_ids[chunk.start + 1 : min(chunk.end + 1, chunk.sequence.num_prompt_tokens)]


def _write_sampling(batch: Batch, sections: Sections[Words], rows: Rows) -> None:
    num_rows, shape = len(batch.sampling), batch.shape
    indices, ends, lasts = batch.rows, batch.ends, batch.ends - batch.starts - 1
    lasts = lasts + shape.tokens * np.arange(len(lasts), dtype=np.int32)
    if num_rows < len(batch.chunks):
        indices, ends, lasts = indices[batch.sampling], ends[batch.sampling], lasts[batch.sampling]
    sections.last[:num_rows] = lasts
    if not batch.plan.is_greedy:
        sampling = sections.sampling.reshape(5, shape.samples)
        sampling[:4, :num_rows] = rows.sampling[:, indices]
        sampling[4, :num_rows] = uniforms(rows.keys[indices], ends).view(np.int32)


def _write_edits(batch: Batch, edits: Words, vocab_size: int) -> None:
    """Padding repeats the last edit: writing a value twice changes nothing."""
    index, divisors, addends = edits[0], edits[1].view(np.float32), edits[2].view(np.float32)
    begin = 0
    for row, token_edits, size in batch.edited:
        part = slice(begin, begin + size)
        sequence = batch.chunks[batch.sampling[row]].sequence
        token_edits.write(sequence.token_ids, index[part], divisors[part], addends[part])
        index[part] += row * vocab_size
        begin += size
    edits[:, begin:] = edits[:, begin - 1 : begin]

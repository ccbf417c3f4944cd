"""The chunks of a step, grouped into forwards, and what each forward's words say. Computes nothing.

A few numpy calls a forward and about a microsecond a chunk: this is what the host does while the device waits.
Legend: B rows, T tokens a row, S rows that sample.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.engine.blocks import blocks_for
from service.engine.edits import BAN, TokenEdits, Words
from service.engine.logprobs import top_size
from service.engine.random_numbers import uniforms
from service.engine.rows import DRAWS, EDITS, GREEDY, LOGPROBS, MASK, MIN_P, Rows
from service.engine.sampler import SamplingPlan
from service.engine.sequence import Chunk
from service.engine.words import Fields, Shape, padded_sizes, power_of_two, round_up

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


@dataclass(slots=True, kw_only=True)
class Batch:
    """The chunks of one forward."""

    generation: int
    chunks: list[Chunk]
    places: list[int]
    """Where the chunks stand in the step."""
    rows: NDArray[np.intp]  # (B,) of `Rows`
    sampling: list[int]
    """Which of the chunks sample."""
    shape: Shape
    plan: SamplingPlan
    num_logprobs: int | None
    """How many of the likeliest tokens come with each sampled one; None is no log probability at all."""
    num_prompt_logprobs: int | None
    edited: list[tuple[int, TokenEdits, Words]]
    """Among those that sample: which one, its edits, and what they are now."""
    masked: list[int]
    """Among those that sample: which ones have a mask."""

    @property
    def is_dense(self) -> bool:
        """One token in each row, and every row samples."""
        return self.shape.tokens == 1 and len(self.sampling) == len(self.chunks)

    @property
    def num_tokens(self) -> int:
        """Without padding."""
        return len(self.chunks) if self.shape.tokens == 1 else sum(chunk.end - chunk.start for chunk in self.chunks)


class Group(NamedTuple):
    """What chunks have in common that go through one forward."""

    generation: int | None
    num_tokens: int
    """Padded, of each."""
    has_prompt_logprobs: bool


def group(chunks: Items[Chunk], sizes: Sizes) -> dict[Group, list[int]]:
    """The places of the chunks of each forward."""
    groups: dict[tuple[int | None, int, bool], list[int]] = {}  # plain tuples: one is made for each chunk
    for place, (sequence, start, end, _) in enumerate(chunks):
        padded = 1 if end - start == 1 else round_up(end - start, sizes.tokens)
        wants = sequence.sampling.prompt_logprobs is not None and start + 1 < sequence.num_prompt_tokens
        key = (sequence.generation, padded, wants)
        if key in groups:
            groups[key].append(place)
        else:
            groups[key] = [place]
    return {Group(*key): places for key, places in groups.items()}


def plan_batch(key: Group, step: Items[Chunk], places: list[int], rows: Rows, sizes: Sizes) -> Batch:
    """How the chunks at these places of the step are computed."""
    assert key.generation is not None
    chunks = [step[place] for place in places]
    sampling = [index for index, chunk in enumerate(chunks) if chunk.samples]
    indices = [_row(chunk) for chunk in chunks]
    sampled = [indices[index] for index in sampling]
    needs = 0
    for row in sampled:
        needs |= rows.needs[row]
    edited = _edited(chunks, sampling, rows) if needs & EDITS else []
    masked = [number for number, row in enumerate(sampled) if rows.needs[row] & MASK] if needs & MASK else []
    tops = [chunks[index].sequence.sampling.logprobs for index in sampling] if needs & LOGPROBS else []
    prompt_tops = [chunk.sequence.sampling.prompt_logprobs for chunk in chunks] if key.has_prompt_logprobs else []
    num_blocks = blocks_for(max([chunk.end for chunk in chunks]), sizes.block_size)
    return Batch(
        generation=key.generation,
        chunks=chunks,
        places=places,
        rows=np.array(indices, dtype=np.intp),
        sampling=sampling,
        shape=Shape(
            rows=round_up(len(chunks), sizes.rows),
            tokens=key.num_tokens,
            blocks=round_up(num_blocks, sizes.blocks),
            samples=round_up(len(sampling), sizes.rows),
            edits=max(FEWEST_EDITS, power_of_two(sum(words.shape[1] for _, _, words in edited))) if edited else 0,
            masks=power_of_two(1 + len(masked)) if masked else 0,
            has_targets=key.has_prompt_logprobs,
        ),
        plan=SamplingPlan(
            draws=bool(needs & DRAWS),
            has_greedy=bool(needs & GREEDY),
            num_candidates=max([rows.num_candidates[row] for row in sampled]) if needs & DRAWS else 0,
            has_min_p=bool(needs & MIN_P),
        ),
        num_logprobs=_most(tops, sizes),
        num_prompt_logprobs=_most(prompt_tops, sizes),
        edited=edited,
        masked=masked,
    )


def _row(chunk: Chunk) -> int:
    row = chunk.sequence.row
    assert row is not None
    return row


def _most(tops: Iterable[int | None], sizes: Sizes) -> int | None:
    most = max((-1 if top is None else top for top in tops), default=-1)
    return None if most < 0 else top_size(most, sizes.vocab_size)


def _edited(chunks: list[Chunk], sampling: list[int], rows: Rows) -> list[tuple[int, TokenEdits, Words]]:
    edited = []
    for number, index in enumerate(sampling):
        edits = rows.edits[_row(chunks[index])]
        if edits is not None and (words := edits.advance(chunks[index].sequence.token_ids)).size:
            edited.append((number, edits, words))
    return edited


def write_words(batch: Batch, fields: Fields[Words], rows: Rows, sizes: Sizes) -> None:
    """Fill the words of one forward, which are zero before."""
    fields.table[: len(batch.chunks)] = rows.table[batch.rows, : batch.shape.blocks]
    _write_tokens(batch, fields.tokens[:, : len(batch.chunks)], rows.table, sizes.block_size)
    if batch.shape.has_targets:
        for row, chunk in enumerate(batch.chunks):
            following = following_tokens(chunk)
            fields.targets[row, : len(following)] = following
    if batch.sampling:
        _write_sampling(batch, fields, rows)
    if batch.edited:
        _write_edits(batch, fields.edits, sizes.vocab_size)
    if batch.masked:
        fields.mask_rows[batch.masked] = np.arange(1, len(batch.masked) + 1)


def _write_tokens(batch: Batch, tokens: Words, table: Words, block_size: int) -> None:
    ids, positions, slots = tokens
    if batch.shape.tokens == 1:
        ids[:, 0] = [sequence.token_ids[start] for sequence, start, _, _ in batch.chunks]
        positions[:, 0] = [chunk.start for chunk in batch.chunks]
        slots[:, 0] = [
            sequence.blocks[start // block_size] * block_size + start % block_size
            for sequence, start, _, _ in batch.chunks
        ]
        return
    for row, (sequence, start, end, _) in enumerate(batch.chunks):
        where = np.arange(start, end, dtype=np.int32)
        blocks = table[batch.rows[row], where // block_size]
        ids[row, : end - start] = sequence.token_ids[start:end]
        positions[row, : end - start] = where
        slots[row, : end - start] = blocks * block_size + where % block_size


def following_tokens(chunk: Chunk) -> list[int]:
    """The tokens of the prompt that stand after those of the chunk, each after its own."""
    return chunk.sequence.token_ids[chunk.start + 1 : min(chunk.end + 1, chunk.sequence.num_prompt_tokens)]


def _write_sampling(batch: Batch, fields: Fields[Words], rows: Rows) -> None:
    num_rows, chunks, indices = len(batch.sampling), batch.chunks, batch.rows
    if not batch.is_dense:
        num_tokens = batch.shape.tokens
        fields.last[:num_rows] = [
            index * num_tokens + chunks[index].end - chunks[index].start - 1 for index in batch.sampling
        ]
        indices = indices[batch.sampling]
    if batch.plan.draws:
        ends = np.array([chunks[index].end for index in batch.sampling], dtype=np.int32)
        fields.sampling[:4, :num_rows] = rows.sampling[:, indices]
        fields.sampling[4, :num_rows] = uniforms(rows.keys[indices], ends).view(np.int32)


def _write_edits(batch: Batch, edits: Words, vocab_size: int) -> None:
    """Padding repeats the last edit: writing a value twice changes nothing."""
    lengths = [words.shape[1] for _, _, words in batch.edited]
    end = sum(lengths)
    np.concatenate([words for _, _, words in batch.edited], axis=1, out=edits[:, :end])
    edits[0, :end] += np.repeat(np.array([row * vocab_size for row, _, _ in batch.edited], dtype=np.int32), lengths)
    addends = edits[2].view(np.float32)
    for begin, (row, token_edits, _) in zip(accumulate(lengths, initial=0), batch.edited, strict=False):
        bans = token_edits.bans(batch.chunks[batch.sampling[row]].sequence.token_ids)
        if bans:
            addends[[begin + place for place in bans]] = BAN
    edits[:, end:] = edits[:, end - 1 : end]

"""Runs the model over the chunks of a step and samples. The only part of the engine that computes on the device.

A step is one upload of int32 words, the forwards, the sampler, and one download of the sampled ids with whatever log
probabilities are asked for; nothing between waits for the device. Only a step with a grammar uploads a second time: its
masks, which are filled while the device computes the forwards. Shapes are padded to a few sizes, so that each could be
captured as a graph.

What happens on the host before: `service.engine.batch`. Legend: B rows, T tokens a row, S rows that sample.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from itertools import pairwise, repeat
from typing import NamedTuple

import torch
from torch import Tensor

from lm.cache import KVCache, PagedBatch
from lm.model import CausalLM
from service.engine.batch import Batch, Sizes, following_tokens, group, plan_batch
from service.engine.logprobs import pack_logprobs, pack_prompt_logprobs, unpack_logprobs
from service.engine.masks import MaskFiller
from service.engine.messages import Logprobs
from service.engine.rows import Rows, Words
from service.engine.sampler import EditInputs, MaskInputs, SamplingInputs, edit, mask, sample
from service.engine.sequence import Chunk
from service.engine.step_input import StepInput
from service.engine.words import Buffer, Sections

FIRST_BUFFER_WORDS = 1 << 16


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


@dataclass(slots=True, kw_only=True)
class Work:
    """One forward on its way through the device."""

    batch: Batch
    model: CausalLM
    words: Sections[Tensor]
    logits: Tensor | None = None  # (S, V)
    prompt: list[Tensor] = field(default_factory=list)
    """Packed log probabilities, (..., words of a token) that make (B * T, words of a token)."""
    sampled: Tensor | None = None
    """(S, 1) int32 ids, or (S, 1 + words of a token) with packed log probabilities."""

    @property
    def results(self) -> list[Tensor]:
        """What goes to the host."""
        return self.prompt if self.sampled is None else [*self.prompt, self.sampled]


class Runner:
    def __init__(
        self,
        cache: KVCache,
        device: torch.device,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        vocab_size: int,
    ) -> None:
        self._cache = cache
        self._vocab_size = vocab_size
        self._sizes = Sizes.up_to(
            max_num_seqs=max_num_seqs,
            max_chunk_tokens=max(max_num_batched_tokens, cache.block_size),
            max_model_len=max_model_len,
            block_size=cache.block_size,
            vocab_size=vocab_size,
        )
        self._rows = Rows(max_num_seqs, max_blocks=self._sizes.blocks[-1], vocab_size=vocab_size)
        self._buffer = Buffer(device, FIRST_BUFFER_WORDS)
        self._filler = MaskFiller()

    @torch.inference_mode()
    def run(self, chunks: Items[Chunk], model_of: Callable[[int], CausalLM]) -> Output:
        """Compute the chunks' keys and values, and sample where a chunk says so. `model_of` knows the generations."""
        begin = time.perf_counter()
        self._rows.refresh(chunks)
        batches = [plan_batch(chunks, places, self._rows, self._sizes) for places in group(chunks, self._sizes)]
        with StepInput(batches, self._rows, self._sizes, self._buffer, self._filler) as step_input:
            works = [
                Work(batch=batch, model=model_of(batch.generation), words=words)
                for batch, words in zip(batches, step_input.upload(), strict=True)
            ]
            marks = [time.perf_counter()]
            for work in works:
                self._forward(work)
                marks.append(time.perf_counter())
            for work, masks in zip(works, step_input.upload_masks(), strict=True):
                self._sample(work, masks)
        output = Output(token_ids=[], logprobs=[], prompt_logprobs={}, forwards=[])
        _unpack(works, output)
        scale = (time.perf_counter() - begin) / (marks[-1] - marks[0])
        for batch, (earlier, later) in zip(batches, pairwise(marks), strict=True):
            num_tokens = int((batch.ends - batch.starts).sum())
            figures = ForwardFigures(batch.generation, len(batch.chunks), num_tokens, (later - earlier) * scale)
            output.forwards.append(figures)
        return output

    def _forward(self, work: Work) -> None:
        """Hidden states, and what is made of them: log probabilities of the prompt, logits where rows sample."""
        batch, words, shape = work.batch, work.words, work.batch.shape
        ids, positions, slots = words.tokens.view(3, shape.rows, shape.tokens).unbind(0)
        table = words.table.view(shape.rows, shape.blocks)
        paged = PagedBatch(cache=self._cache, slot_mapping=slots.flatten(), block_table=table)
        hidden = work.model(ids, positions, paged).flatten(0, 1)  # (B * T, W)
        if batch.num_prompt_logprobs is not None:
            work.prompt = pack_prompt_logprobs(
                hidden,
                words.targets,
                batch.num_prompt_logprobs,
                logits_of=work.model.logits,
                vocab_size=self._vocab_size,
            )
        if batch.sampling:
            work.logits = work.model.logits(hidden if batch.is_dense else hidden.index_select(0, words.last))

    def _sample(self, work: Work, masks: Tensor) -> None:
        if work.logits is None:
            return
        batch, words, shape = work.batch, work.words, work.batch.shape
        logits = work.logits
        if batch.edited:
            index, divisor, addend = words.edits.view(3, shape.edits).unbind(0)
            floats = {"divisor": divisor.view(torch.float32), "addend": addend.view(torch.float32)}
            logits = edit(logits, EditInputs(index=index, **floats))
        if batch.masked:
            logits = mask(logits, MaskInputs(words=masks.view(shape.masks, -1), rows=words.mask_rows))
        token_ids = sample(logits, _sampling_inputs(words.sampling.view(5, shape.samples)), batch.plan)
        packed = token_ids.unsqueeze(1)
        if batch.num_logprobs is not None:
            packed = torch.cat((packed, pack_logprobs(work.logits, token_ids, batch.num_logprobs)), 1)
        work.sampled = packed


def _sampling_inputs(words: Tensor) -> SamplingInputs:
    temperature, top_k, top_p, min_p, uniform = words.unbind(0)
    return SamplingInputs(
        temperature=temperature.view(torch.float32),
        top_k=top_k,
        top_p=top_p.view(torch.float32),
        min_p=min_p.view(torch.float32),
        uniform=uniform.view(torch.float32),
    )


def _unpack(works: Items[Work], output: Output) -> None:
    """Take the step's results to the host, by one copy, and put them where they belong."""
    results = [result for work in works for result in work.results]
    if not results:
        return
    words: Words = torch.cat([result.flatten() for result in results]).cpu().numpy()
    sampled: dict[int, tuple[int, Logprobs | None]] = {}
    begin = 0
    for work in works:
        end = begin + sum(part.numel() for part in work.prompt)
        if work.prompt:
            output.prompt_logprobs.update(_unpack_prompts(work.batch, words[begin:end]))
        begin = end
        if work.sampled is not None:
            end = begin + work.sampled.numel()
            sampled.update(_unpack_sampled(work.batch, words[begin:end].reshape(work.sampled.shape)))
            begin = end
    for place in sorted(sampled):
        token_id, logprobs = sampled[place]
        output.token_ids.append(token_id)
        output.logprobs.append(logprobs)


def _unpack_sampled(batch: Batch, words: Words) -> Iterator[tuple[int, tuple[int, Logprobs | None]]]:
    """By place in the step."""
    words = words[: len(batch.sampling)]
    places = [batch.places[index] for index in batch.sampling]
    logprobs: Iterable[Logprobs | None] = repeat(None)
    if batch.num_logprobs is not None:
        wanted = [batch.chunks[index].sequence.sampling.logprobs for index in batch.sampling]
        logprobs = unpack_logprobs(words[:, 1:], wanted)
    return zip(places, zip(words[:, 0].tolist(), logprobs, strict=False), strict=True)


def _unpack_prompts(batch: Batch, words: Words) -> Iterator[tuple[int, tuple[Logprobs, ...]]]:
    """By place in the step."""
    grid = words.reshape(batch.shape.rows, batch.shape.tokens, -1)
    for place, chunk, rows in zip(batch.places, batch.chunks, grid, strict=False):
        num_tokens = len(following_tokens(chunk))
        wanted = [chunk.sequence.sampling.prompt_logprobs] * num_tokens
        yield place, tuple(item for item in unpack_logprobs(rows[:num_tokens], wanted) if item is not None)

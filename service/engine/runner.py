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
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

from lm.cache import KVCache, PagedBatch
from lm.model import CausalLM
from service.engine.batch import Batch, Sizes, following_tokens, group, plan_batch
from service.engine.edits import Words
from service.engine.logprobs import pack_logprobs, pack_prompt_logprobs, unpack_logprobs
from service.engine.masks import MaskFiller
from service.engine.messages import Logprobs
from service.engine.rows import Rows
from service.engine.sampler import MaskInputs, edit, mask, sample
from service.engine.sequence import Chunk
from service.engine.step_input import StepInput
from service.engine.words import Buffer, Frame

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


@dataclass(slots=True)
class Output:
    token_ids: list[int] = field(default_factory=list)
    """One for each chunk that samples, in order."""
    logprobs: list[Logprobs | None] = field(default_factory=list)
    """Of each of `token_ids`, where they are asked for."""
    prompt_logprobs: dict[int, tuple[Logprobs, ...]] = field(default_factory=dict)
    """By index of the chunk: of the prompt's tokens that follow those of the chunk."""
    forwards: list[ForwardFigures] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class Work:
    """One forward on its way through the device."""

    batch: Batch
    model: CausalLM
    frame: Frame
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
        groups = group(chunks, self._sizes)
        batches = [plan_batch(key, chunks, places, self._rows, self._sizes) for key, places in groups.items()]
        with StepInput(batches, self._rows, self._sizes, self._buffer, self._filler) as step_input:
            works = [
                Work(batch=batch, model=model_of(batch.generation), frame=frame)
                for batch, frame in zip(batches, step_input.frames, strict=True)
            ]
            step_input.upload()
            marks = [time.perf_counter()]
            for work in works:
                self._forward(work)
                marks.append(time.perf_counter())
            step_input.upload_masks()
            for index, work in enumerate(works):
                if work.logits is not None:
                    work.sampled = self._sample(work, work.logits, step_input.masks_of(index))
        output = _unpack(works)
        scale = (time.perf_counter() - begin) / (marks[-1] - marks[0])
        for batch, (earlier, later) in zip(batches, pairwise(marks), strict=True):
            seconds = (later - earlier) * scale
            figures = ForwardFigures(batch.generation, len(batch.chunks), batch.num_tokens, seconds)
            output.forwards.append(figures)
        return output

    def _forward(self, work: Work) -> None:
        """Hidden states, and what is made of them: log probabilities of the prompt, logits where rows sample."""
        batch, frame, fields = work.batch, work.frame, work.frame.device
        paged = PagedBatch(cache=self._cache, slot_mapping=frame.slots, block_table=fields.table)
        hidden = work.model(frame.ids, frame.positions, paged).flatten(0, 1)  # (B * T, W)
        if batch.num_prompt_logprobs is not None:
            work.prompt = pack_prompt_logprobs(
                hidden,
                fields.targets.view(-1),
                batch.num_prompt_logprobs,
                logits_of=work.model.logits,
                vocab_size=self._vocab_size,
            )
        if batch.sampling:
            work.logits = work.model.logits(hidden if batch.is_dense else hidden.index_select(0, fields.last))

    def _sample(self, work: Work, logits: Tensor, masks: Tensor) -> Tensor:
        """(S, V) logits -> (S, 1) ids, or (S, 1 + words of a token) where log probabilities are asked for."""
        batch, frame = work.batch, work.frame
        chosen_from = logits
        if batch.edited:
            chosen_from = edit(chosen_from, frame.edits)
        if batch.masked:
            words = masks.view(batch.shape.masks, -1)
            chosen_from = mask(chosen_from, MaskInputs(words=words, rows=frame.device.mask_rows))
        token_ids = sample(chosen_from, frame.sampling, batch.plan)
        if batch.num_logprobs is None:
            return token_ids.unsqueeze(1)
        return torch.cat((token_ids.unsqueeze(1), pack_logprobs(logits, token_ids, batch.num_logprobs)), 1)


def _unpack(works: Items[Work]) -> Output:
    """Take the step's results to the host, by one copy, and put them where they belong."""
    output = Output()
    results = [result.view(-1) for work in works for result in work.results]
    if not results:
        return output
    words: Words = (results[0] if len(results) == 1 else torch.cat(results)).cpu().numpy()
    sampled: list[tuple[int, int, Logprobs | None]] = []
    begin = 0
    for work in works:
        if work.prompt:
            end = begin + sum(part.numel() for part in work.prompt)
            output.prompt_logprobs.update(_unpack_prompts(work.batch, words[begin:end]))
            begin = end
        if work.sampled is not None:
            end = begin + work.sampled.numel()
            sampled += _unpack_sampled(work.batch, words[begin:end].reshape(work.sampled.shape))
            begin = end
    if len(works) > 1:
        sampled.sort(key=itemgetter(0))
    output.token_ids += [token_id for _, token_id, _ in sampled]
    output.logprobs += [logprobs for _, _, logprobs in sampled]
    return output


def _unpack_sampled(batch: Batch, words: Words) -> Iterator[tuple[int, int, Logprobs | None]]:
    """Place in the step, token and what is asked for, of each chunk that samples."""
    words = words[: len(batch.sampling)]
    logprobs: Iterable[Logprobs | None] = repeat(None)
    if batch.num_logprobs is not None:
        wanted = [batch.chunks[index].sequence.sampling.logprobs for index in batch.sampling]
        logprobs = unpack_logprobs(words[:, 1:], wanted)
    return zip([batch.places[index] for index in batch.sampling], words[:, 0].tolist(), logprobs, strict=False)


def _unpack_prompts(batch: Batch, words: Words) -> Iterator[tuple[int, tuple[Logprobs, ...]]]:
    """By place in the step."""
    grid = words.reshape(batch.shape.rows, batch.shape.tokens, -1)
    for place, chunk, rows in zip(batch.places, batch.chunks, grid, strict=False):
        num_tokens = len(following_tokens(chunk))
        wanted = [chunk.sequence.sampling.prompt_logprobs] * num_tokens
        yield place, tuple(item for item in unpack_logprobs(rows[:num_tokens], wanted) if item is not None)

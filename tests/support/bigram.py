"""A model whose next token depends on the last one only, and a runner over it: logits are what a test says."""

from __future__ import annotations

from collections.abc import Sequence as Items
from itertools import count
from typing import Any

import torch
from torch import Tensor

from lm.cache import KVCache, PagedBatch
from service.engine.blocks import blocks_for
from service.engine.messages import SamplingParams
from service.engine.runner import Output, Runner
from service.engine.sampler import normalise
from service.engine.sequence import Chunk, Matcher, Sequence

BLOCK_SIZE = 4
MAX_MODEL_LEN = 64
CPU = torch.device("cpu")


class Bigram:
    """Logits after token i are row i of a table; counts its calls and checks what it is called with."""

    def __init__(self, table: Tensor) -> None:
        self.table = table  # (V, V)
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, ids: Tensor, positions: Tensor, paged: PagedBatch) -> Tensor:
        assert ids.dtype == positions.dtype == paged.slot_mapping.dtype == paged.block_table.dtype == torch.int32
        assert ids.shape == positions.shape
        assert len(paged.slot_mapping) == ids.numel()
        self.shapes.append(tuple(ids.shape))
        return ids.unsqueeze(-1)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.table.index_select(0, hidden.flatten()).view(*hidden.shape[:-1], -1)


class Desk:
    """Rows, blocks and steps by hand, where the engine has a scheduler. `model` is one, or what stands in for one."""

    def __init__(
        self,
        model: Any,
        cache: KVCache,
        *,
        vocab_size: int,
        device: torch.device = CPU,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 16,
    ) -> None:
        self.model = model
        self.vocab_size = vocab_size
        self.runner = Runner(
            cache,
            device,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=MAX_MODEL_LEN,
            vocab_size=vocab_size,
        )
        self._bindings = count(1)
        self._free_blocks = iter(range(1, cache.num_blocks))

    def sequence(
        self,
        prompt: Items[int],
        answer: Items[int] = (),
        *,
        row: int = 0,
        stop_token_ids: Items[int] = (),
        matcher: Matcher | None = None,
        **sampling: Any,
    ) -> Sequence:
        """A request that has its row, and blocks for all its tokens."""
        params = SamplingParams(**{"max_tokens": 16, **sampling})
        sequence = Sequence(
            request_id=f"r{row}",
            model_id="m",
            token_ids=[*prompt, *answer],
            num_prompt_tokens=len(prompt),
            sampling=normalise(params, self.vocab_size),
            seed=params.seed or 0,
            arrived=0.0,
            generation=0,
            stop_token_ids=frozenset(stop_token_ids),
            matcher=matcher,
            row=row,
            binding=next(self._bindings),
        )
        self.grow(sequence)
        return sequence

    def grow(self, sequence: Sequence) -> None:
        missing = blocks_for(sequence.num_tokens, BLOCK_SIZE) - len(sequence.blocks)
        sequence.blocks += [next(self._free_blocks) for _ in range(missing)]

    def run(self, *chunks: Chunk) -> Output:
        return self.runner.run(chunks, lambda _: self.model)

    def next_tokens(self, *sequences: Sequence) -> list[int]:
        """One decoding step of all."""
        return self.run(*map(decoding, sequences)).token_ids

    def continue_by(self, num_tokens: int, *sequences: Sequence) -> list[list[int]]:
        """The tokens that each goes on with, which it has then."""
        for _ in range(num_tokens):
            for sequence, token_id in zip(sequences, self.next_tokens(*sequences), strict=True):
                sequence.token_ids.append(token_id)
                self.grow(sequence)
        return [sequence.token_ids[-num_tokens:] for sequence in sequences]


def bigram_desk(table: Tensor, *, max_num_seqs: int = 8) -> Desk:
    num_blocks = 1 + 2 * max_num_seqs * blocks_for(MAX_MODEL_LEN, BLOCK_SIZE)
    cache = KVCache(keys=(), values=(), num_blocks=num_blocks, block_size=BLOCK_SIZE)
    return Desk(Bigram(table), cache, vocab_size=len(table), device=table.device, max_num_seqs=max_num_seqs)


def decoding(sequence: Sequence) -> Chunk:
    """Its last token."""
    return Chunk(sequence, sequence.num_tokens - 1, sequence.num_tokens, True)


def prefilling(sequence: Sequence, start: int = 0, end: int | None = None) -> Chunk:
    end = sequence.num_tokens if end is None else end
    return Chunk(sequence, start, end, end == sequence.num_tokens)


def random_table(vocab_size: int, seed: int = 0) -> Tensor:
    return torch.randn(vocab_size, vocab_size, generator=torch.Generator().manual_seed(seed)) * 2

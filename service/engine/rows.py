"""What the runner keeps of each running request from step to step, as arrays that a step's words are gathered from."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from service.engine.edits import TokenEdits, Words, needs_edits
from service.engine.random_numbers import stream_key
from service.engine.sampler import num_candidates
from service.engine.sequence import Chunk, Sequence

GREEDY, DRAWS, MIN_P, EDITS, MASK, LOGPROBS = 1, 2, 4, 8, 16, 32
"""What a row asks of the sampler, as bits of `Rows.needs`."""


class Rows:
    """Valid for a row as long as the sequence in it has the same binding; `refresh` looks after that.

    Legend: R rows, M blocks a row.
    """

    def __init__(self, num_rows: int, *, max_blocks: int, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._bindings = [0] * num_rows
        self._num_blocks = [0] * num_rows
        self.table = np.zeros((num_rows, max_blocks), dtype=np.int32)
        self.sampling = np.zeros((4, num_rows), dtype=np.int32)
        """Temperature, top_k, top_p, min_p of each row; all but top_k are the bits of an fp32."""
        self._floats = self.sampling.view(np.float32)
        self.num_candidates = [0] * num_rows
        self.needs = [0] * num_rows
        self.keys = np.zeros(num_rows, dtype=np.uint64)
        """Of the streams of random numbers."""
        self.edits: list[TokenEdits | None] = [None] * num_rows
        self.masks: list[Words | None] = [None] * num_rows
        """The tokens that may ever be chosen, where not all may."""

    def refresh(self, chunks: Iterable[Chunk]) -> None:
        """Take what is new in the sequences of a step."""
        bindings, num_blocks = self._bindings, self._num_blocks
        for chunk in chunks:
            sequence = chunk.sequence
            row = sequence.row
            assert row is not None
            if bindings[row] != sequence.binding:
                self._bind(row, sequence)
            if num_blocks[row] != len(sequence.blocks):
                new = sequence.blocks[num_blocks[row] :]
                self.table[row, num_blocks[row] : len(sequence.blocks)] = new
                num_blocks[row] = len(sequence.blocks)

    def _bind(self, row: int, sequence: Sequence) -> None:
        sampling = sequence.sampling
        self._num_blocks[row] = 0
        self.table[row] = 0
        self._floats[0, row] = sampling.temperature
        self.sampling[1, row] = sampling.top_k
        self._floats[2, row] = sampling.top_p
        self._floats[3, row] = sampling.min_p
        self.num_candidates[row] = num_candidates(sampling, self._vocab_size)
        self.keys[row] = stream_key(sequence.seed, sampling.choice)
        self.edits[row] = TokenEdits(sequence) if needs_edits(sampling) else None
        allowed = sampling.allowed_token_ids
        self.masks[row] = None if allowed is None else pack_mask(allowed, self._vocab_size)
        self.needs[row] = (
            (DRAWS if sampling.temperature > 0 else GREEDY)
            | (MIN_P if sampling.min_p > 0 else 0)
            | (EDITS if self.edits[row] is not None else 0)
            | (MASK if allowed is not None or sequence.matcher is not None else 0)
            | (LOGPROBS if sampling.logprobs is not None else 0)
        )
        self._bindings[row] = sequence.binding


def mask_words(vocab_size: int) -> int:
    """Of one mask: a bit for each token."""
    return -(-vocab_size // 32)


def pack_mask(allowed: Iterable[int], vocab_size: int) -> Words:
    """Bit i of word j is set where token 32 * j + i is allowed."""
    bits = np.zeros(32 * mask_words(vocab_size), dtype=np.uint8)
    bits[list(allowed)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)

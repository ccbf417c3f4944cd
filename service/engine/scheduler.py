"""What the next step computes. Plain Python: knows requests and blocks, neither tensors nor clocks.

A step is one token of each request that decodes, and parts of prompts for the rest of the token budget, so a long
prompt never stops the others; they never stop it either, since at least one block of a prompt is computed. Admission
is first come, first served. Blocks are taken as a request grows; when there are none left the youngest running request
gives its blocks back and is computed again later, ahead of everything that waits. Running requests are therefore always
older than waiting ones, and both lists are in order of arrival.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Iterable

from service.engine.blocks import BlockPool, blocks_for
from service.engine.prefixes import Prefixes
from service.engine.sequence import Chunk, Sequence, Step


class Scheduler:
    """No method takes time in the number of waiting requests."""

    def __init__(self, pool: BlockPool, *, block_size: int, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.pool = pool
        self._prefixes = Prefixes(pool, block_size)
        self._block_size = block_size
        self._max_num_batched_tokens = max_num_batched_tokens
        self._running: list[Sequence] = []
        self._waiting: OrderedDict[str, Sequence] = OrderedDict()
        self._free_rows = list(reversed(range(max_num_seqs)))
        self._num_bindings = 0
        self._refused: tuple[Sequence, int] | None = None
        """The oldest waiting request when it did not fit, and the pool's `num_frees` then."""

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def is_idle(self) -> bool:
        return not self._running and not self._waiting

    def add(self, sequence: Sequence) -> None:
        """The caller has checked that the whole request fits into an empty pool."""
        assert sequence.request_id not in self._waiting
        self._waiting[sequence.request_id] = sequence

    def remove(self, sequence: Sequence) -> None:
        """Forget a request, whatever its state; its blocks are free at once."""
        if self._waiting.pop(sequence.request_id, None) is None:
            self._running.remove(sequence)
            self._release(sequence)

    def schedule(self) -> Step:
        """Decide the next step. Its result goes to `commit`; where it failed, its sequences go to `remove`."""
        num_running = len(self._running)
        chunks, prefilling = self._decode()
        num_preempted = num_running - len(self._running)
        num_decoding = len(chunks)
        budget = max(self._max_num_batched_tokens - num_decoding, self._block_size)
        self._prefill(prefilling, chunks, budget)
        return Step(chunks=tuple(chunks), num_decoding=num_decoding, num_preempted=num_preempted)

    def commit(self, step: Step, token_ids: Iterable[int], now: float) -> None:
        """Append a token to each sequence whose chunk samples, in order. Those that are finished then are removed."""
        block_size = self._block_size
        tokens = iter(token_ids)
        finished: list[Sequence] = []
        for sequence, start, end, samples in step.chunks:
            sequence.num_computed = end
            if end // block_size != start // block_size:
                self._prefixes.fill(sequence, start, end)
            if samples:
                sequence.append(next(tokens), now)
                if sequence.finish_reason is not None:
                    finished.append(sequence)
            elif end == len(sequence.token_ids):
                sequence.finish_reason = "length"  # a prompt only
                finished.append(sequence)
        if finished:
            self._running = [sequence for sequence in self._running if sequence.finish_reason is None]
            for sequence in finished:
                self._release(sequence)

    def forget_others(self, generations: Container[int]) -> None:
        """Weights that are not among these have gone, and what was computed with them is of no use."""
        self.pool.forget_others(generations)

    def check_idle(self) -> None:
        """With no request left every block is free. Raises RuntimeError when one was lost."""
        self.pool.check()
        if self.is_idle and self.pool.num_used:
            raise RuntimeError(f"{self.pool.num_used} KV blocks belong to no request")

    def _decode(self) -> tuple[list[Chunk], list[Sequence]]:
        """A token of each request that decodes, with room for it, oldest first; and the requests that do not."""
        block_size = self._block_size
        chunks: list[Chunk] = []
        prefilling: list[Sequence] = []
        for sequence in self._running:  # which loses its end where blocks run out, and the loop ends there then
            start, end = sequence.num_computed, len(sequence.token_ids)
            if end - start != 1 or end == sequence.num_prompt_tokens:
                prefilling.append(sequence)
            elif start < len(sequence.blocks) * block_size or self._grow(sequence):
                chunks.append(Chunk(sequence, start, end, True))
        return chunks, prefilling

    def _grow(self, sequence: Sequence) -> bool:
        """Give a running request a block more. False where it was the youngest, and was preempted itself."""
        while not self.pool.num_free:
            victim = self._running.pop()
            self._release(victim)
            victim.num_preempted += 1
            self._waiting[victim.request_id] = victim
            self._waiting.move_to_end(victim.request_id, last=False)
            if victim is sequence:
                return False
        sequence.blocks += self.pool.allocate(1)
        return True

    def _prefill(self, prefilling: list[Sequence], chunks: list[Chunk], budget: int) -> None:
        """Add parts of prompts, of the oldest request first, and start waiting requests while budget is left."""
        for sequence in prefilling:
            budget -= self._add_chunk(sequence, chunks, budget)
        while budget and (started := self._admit()) is not None:
            budget -= self._add_chunk(started, chunks, budget)

    def _add_chunk(self, sequence: Sequence, chunks: list[Chunk], budget: int) -> int:
        """Returns what it takes of the budget: all of it where it does not get to the end."""
        start, num_tokens = sequence.num_computed, len(sequence.token_ids)
        end = num_tokens
        if end - start > budget:
            end = (start + budget) // self._block_size * self._block_size  # whole blocks, which others may wait for
        if end <= start:
            return budget
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = start
        chunks.append(Chunk(sequence, start, end, end == num_tokens and sequence.sampling.max_tokens > 0))
        return end - start if end == num_tokens else budget

    def _admit(self) -> Sequence | None:
        """Start the oldest waiting request if its tokens fit and nobody computes its beginning just now.

        Each running request may soon take a block more; a request that took the last ones would be preempted at once.
        """
        if not self._waiting or not self._free_rows:
            return None
        sequence = next(iter(self._waiting.values()))
        if self._refused == (sequence, self.pool.num_frees):
            return None
        shared = self._prefixes.match(sequence)
        if shared is None:
            return None
        num_new = blocks_for(len(sequence.token_ids), self._block_size) - len(shared)
        num_taken = num_new + self.pool.num_free_among(shared)
        if num_taken + len(self._running) > self.pool.num_free:
            self._refused = sequence, self.pool.num_frees
            return None
        del self._waiting[sequence.request_id]
        self._bind(sequence, shared, num_new)
        return sequence

    def _bind(self, sequence: Sequence, shared: list[int], num_new: int) -> None:
        self._num_bindings += 1
        sequence.row, sequence.binding = self._free_rows.pop(), self._num_bindings
        self.pool.share(shared)
        sequence.blocks = shared + self.pool.allocate(num_new)
        self._prefixes.begin(sequence, len(shared))
        self._running.append(sequence)

    def _release(self, sequence: Sequence) -> None:
        assert sequence.row is not None
        self.pool.free(sequence.blocks)
        self._free_rows.append(sequence.row)
        sequence.row, sequence.blocks, sequence.num_computed = None, [], 0

"""What the next step computes. Plain Python: knows requests and blocks, neither tensors nor clocks.

A step is one decode batch of every running request plus at most one chunk of one prompt, so a long prompt never stops
the others. Admission is first come, first served. Blocks are taken as a request grows; when there are none left the
youngest running request gives its blocks back and is computed again later, ahead of everything that waits. Running
requests are therefore always older than waiting ones, and both lists are in order of arrival.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from service.engine.blocks import BlockPool, blocks_for
from service.engine.sequence import Chunk, Sequence, Step


class Scheduler:
    """No method takes time in the number of waiting requests."""

    def __init__(self, pool: BlockPool, *, block_size: int, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.pool = pool
        self._block_size = block_size
        self._max_num_seqs = max_num_seqs
        self._prefill_chunk = max_num_batched_tokens
        self._running: list[Sequence] = []
        self._waiting: OrderedDict[str, Sequence] = OrderedDict()
        self._free_rows = list(range(max_num_seqs))
        self._num_bindings = 0

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
        num_preempted = self._grow()
        self._admit()
        decode = [self._chunk(sequence) for sequence in self._running if sequence.is_decoding]
        prefill = [self._chunk(sequence) for sequence in self._running if not sequence.is_decoding][:1]
        return Step(chunks=(*decode, *prefill), num_decoding=len(decode), num_preempted=num_preempted)

    def commit(self, step: Step, token_ids: Iterable[int], now: float) -> list[Sequence]:
        """Append a token to each sequence whose chunk samples, in order, and return these. Finished ones are removed."""
        for chunk in step.chunks:
            chunk.sequence.num_computed = chunk.end
        grown = [chunk.sequence for chunk in step.chunks if chunk.samples]
        for sequence, token_id in zip(grown, token_ids, strict=True):
            sequence.append(token_id, now)
            if sequence.finish_reason is not None:
                self.remove(sequence)
        return grown

    def check_idle(self) -> None:
        """With no request left every block is free. Raises RuntimeError when one was lost."""
        self.pool.check()
        if self.is_idle and self.pool.num_used:
            raise RuntimeError(f"{self.pool.num_used} KV blocks belong to no request")

    def _grow(self) -> int:
        """Give each decoding request room for its last token, oldest first. Returns how many were preempted."""
        num_preempted = 0
        index = 0
        while index < len(self._running):
            sequence = self._running[index]
            missing = self._blocks_for(sequence) - len(sequence.blocks)
            if missing <= self.pool.num_free:
                sequence.blocks += self.pool.allocate(max(0, missing))
                index += 1
            else:
                self._preempt_youngest()
                num_preempted += 1
        return num_preempted

    def _preempt_youngest(self) -> None:
        sequence = self._running.pop()
        self._release(sequence)
        sequence.num_preempted += 1
        self._waiting[sequence.request_id] = sequence
        self._waiting.move_to_end(sequence.request_id, last=False)

    def _admit(self) -> None:
        """Start the oldest waiting request if no prompt is being computed and its tokens fit.

        Each running request may soon take a block more; a request that took the last ones would be preempted at once.
        """
        if not self._waiting or len(self._running) >= self._max_num_seqs:
            return
        if self._running and not self._running[-1].is_decoding:
            return
        sequence = next(iter(self._waiting.values()))
        needed = self._blocks_for(sequence)
        if needed + len(self._running) > self.pool.num_free:
            return
        del self._waiting[sequence.request_id]
        sequence.blocks += self.pool.allocate(needed)
        sequence.row = self._free_rows.pop()
        self._num_bindings += 1
        sequence.binding = self._num_bindings
        self._running.append(sequence)

    def _chunk(self, sequence: Sequence) -> Chunk:
        start = sequence.num_computed
        end = min(sequence.num_tokens, start + self._prefill_chunk)
        return Chunk(sequence=sequence, start=start, end=end, samples=end == sequence.num_tokens)

    def _blocks_for(self, sequence: Sequence) -> int:
        return blocks_for(sequence.num_tokens, self._block_size)

    def _release(self, sequence: Sequence) -> None:
        self.pool.free(sequence.blocks)
        sequence.blocks = []
        sequence.num_computed = 0
        if sequence.row is not None:
            self._free_rows.append(sequence.row)
            sequence.row = None

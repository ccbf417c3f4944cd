"""What the next step computes. Plain Python: knows requests and blocks, neither tensors nor clocks.

A step is one decode batch of every running request plus at most one chunk of one prompt, so a long prompt never stops
the others. Admission is first come, first served. Blocks are taken as a request grows; when there are none left the
youngest running request gives its blocks back and is computed again later, ahead of everything that waits. Running
requests are therefore always older than waiting ones, and both lists are in order of arrival.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from service.engine.blocks import BlockPool, blocks_for
from service.engine.sequence import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillChunk:
    """Tokens [start, end) of a request that is not decoding yet."""

    sequence: Sequence
    start: int
    end: int
    is_last: bool
    """The next token is sampled after this chunk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    decode: tuple[Sequence, ...]
    prefill: PrefillChunk | None
    num_preempted: int

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        return self.decode if self.prefill is None else (*self.decode, self.prefill.sequence)


class Scheduler:
    """No method takes time in the number of waiting requests."""

    def __init__(self, pool: BlockPool, *, block_size: int, max_num_seqs: int, prefill_chunk: int) -> None:
        self.pool = pool
        self._block_size = block_size
        self._max_num_seqs = max_num_seqs
        self._prefill_chunk = prefill_chunk
        self._running: list[Sequence] = []
        self._waiting: OrderedDict[str, Sequence] = OrderedDict()

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
        """Decide the next step. Its result goes to `commit`, or each of its sequences to `remove`."""
        num_preempted = self._grow()
        self._admit()
        prefill = next((self._chunk(sequence) for sequence in self._running if not sequence.is_decoding), None)
        decode = tuple(sequence for sequence in self._running if sequence.is_decoding)
        return Step(decode=decode, prefill=prefill, num_preempted=num_preempted)

    def commit(self, step: Step, sampled: Mapping[str, int], now: float) -> list[Sequence]:
        """Append the sampled tokens, by request id. Returns the requests that got one; finished ones are removed."""
        for sequence in step.decode:
            sequence.num_computed += 1
        if step.prefill is not None:
            step.prefill.sequence.num_computed = step.prefill.end
        grown = [sequence for sequence in step.sequences if sequence.request_id in sampled]
        for sequence in grown:
            sequence.append(sampled[sequence.request_id], now)
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
        self._running.append(sequence)

    def _chunk(self, sequence: Sequence) -> PrefillChunk:
        start = sequence.num_computed
        end = min(sequence.num_tokens, start + self._prefill_chunk)
        return PrefillChunk(sequence=sequence, start=start, end=end, is_last=end == sequence.num_tokens)

    def _blocks_for(self, sequence: Sequence) -> int:
        return blocks_for(sequence.num_tokens, self._block_size)

    def _release(self, sequence: Sequence) -> None:
        self.pool.free(sequence.blocks)
        sequence.blocks = []
        sequence.num_computed = 0

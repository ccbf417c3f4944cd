"""What a scheduler's steps do to a KV pool, without tensors: each slot remembers what was computed into it.

A step may read only slots that earlier steps wrote for the same weights and the same tokens from the first on.
"""

from __future__ import annotations

from service.engine.messages import SamplingParams
from service.engine.scheduler import Scheduler
from service.engine.sequence import Chunk, Sequence, Step

Slot = tuple[int, int]
"""Block, place in it."""


def sequence(
    name: str, tokens: int | list[int], max_tokens: int, *, generation: int = 1, stop_token_ids: tuple[int, ...] = ()
) -> Sequence:
    """A request for the scheduler; so many `tokens` are 0, 1, 2 ..."""
    token_ids = list(range(tokens)) if isinstance(tokens, int) else tokens
    return Sequence(
        request_id=name,
        model_id="m",
        token_ids=token_ids,
        num_prompt_tokens=len(token_ids),
        sampling=SamplingParams(max_tokens=max_tokens),
        seed=0,
        generation=generation,
        stop_token_ids=frozenset(stop_token_ids),
        arrived=0.0,
    )


class ModelledPool:
    def __init__(self, scheduler: Scheduler, block_size: int, vocab_size: int = 3) -> None:
        self.num_computed_tokens = 0
        self._scheduler = scheduler
        self._block_size = block_size
        self._vocab_size = vocab_size
        self._contents: dict[Slot, int] = {}

    def step(self) -> Step:
        """One step; the answers are a function of the tokens before them, of few different ones."""
        step = self._scheduler.schedule()
        self.compute(step)
        self._scheduler.commit(step, [self._next(chunk) for chunk in step.chunks if chunk.samples], 0.0)
        return step

    def compute(self, step: Step) -> None:
        """The part of a step that a runner does. AssertionError where it reads what is not there."""
        written: dict[Slot, int] = {}
        for chunk in step.chunks:
            contents = self._contents_of(chunk.sequence)
            for position in range(chunk.start):
                slot = self._slot(chunk.sequence, position)
                assert self._contents.get(slot) == contents[position], (chunk.sequence.request_id, position)
            for position in range(chunk.start, chunk.end):
                slot = self._slot(chunk.sequence, position)
                assert slot not in written, "two requests write into one slot"
                written[slot] = contents[position]
            self.num_computed_tokens += chunk.end - chunk.start
        self._contents |= written

    def _next(self, chunk: Chunk) -> int:
        return self._contents_of(chunk.sequence)[-1] % self._vocab_size

    def _contents_of(self, sequence: Sequence) -> list[int]:
        """For each token what its keys and values depend on."""
        contents: list[int] = []
        state = sequence.generation or 0
        for token_id in sequence.token_ids:
            state = hash((state, token_id))
            contents.append(state)
        return contents

    def _slot(self, sequence: Sequence, position: int) -> Slot:
        return sequence.blocks[position // self._block_size], position % self._block_size

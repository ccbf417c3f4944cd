"""One request as the engine sees it: its tokens, its place, its clock; and the part of it that a step computes.

Torch-free.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from service.engine.blocks import NO_NAME
from service.engine.messages import FinishReason, RequestTiming, SamplingParams


class Matcher(Protocol):
    """Where an answer stands in its grammar."""

    def fill_mask(self, words: NDArray[np.int32]) -> None:
        """Set a bit for each token that may come next. Matchers do not disturb each other: any thread may call."""

    def accept(self, token_id: int) -> bool:
        """Go on by one token; False when the grammar has no such token here, or when it cannot be followed further."""

    @property
    def is_over(self) -> bool:
        """Whether nothing but the end may follow."""

    @property
    def failure(self) -> str | None:
        """Why `accept` said no."""


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    request_id: str
    model_id: str
    token_ids: list[int]
    """The prompt, then the answer so far. Only appended to."""
    num_prompt_tokens: int
    sampling: SamplingParams
    seed: int
    arrived: float
    """Clock readings are seconds of one monotonic clock."""
    generation: int | None = None
    """The weights it was admitted with; it finishes on them whatever is loaded meanwhile."""
    stop_token_ids: frozenset[int] = frozenset()
    matcher: Matcher | None = None
    """Follows the answer so far; None is no grammar."""
    row: int | None = None
    """Its place among the running requests, 0..max_num_seqs-1; None while it waits."""
    binding: int = 0
    """A number that no other request ever had, new each time it gets a row: while it stays, `blocks` only grows."""
    num_computed: int = 0
    """Tokens whose keys and values are in the pool."""
    num_cached_tokens: int | None = None
    """Tokens that were in the pool already when it was first computed; None before that."""
    blocks: list[int] = field(default_factory=list)
    num_named_blocks: int = 0
    """The first of them, whose contents have a name in the pool."""
    last_name: int = NO_NAME
    """That of the last one among these."""
    num_preempted: int = 0
    scheduled: float | None = None
    first_token: float | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None
    """Why it failed, where that is the reason that it ended."""
    decode_bytes: int = 0
    is_told: bool = False
    """Whether an output said something of it."""
    num_told_logprobs: int = 0
    """Of its prompt's tokens."""

    @property
    def choice(self) -> int:
        return self.sampling.choice

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_answer_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    def append(self, token_id: int, now: float) -> None:
        """Take the sampled token; sets `finish_reason` if it is the last one."""
        self.token_ids.append(token_id)
        if self.first_token is None:
            self.first_token = now
        if self.matcher is not None and not self.matcher.accept(token_id):
            self.finish_reason = "abort"
            self.error = f"the answer could not be made to follow its grammar to the end: {self.matcher.failure}"
        elif token_id in self.stop_token_ids or (self.matcher is not None and self.matcher.is_over):
            self.finish_reason = "stop"
        elif len(self.token_ids) - self.num_prompt_tokens >= self.sampling.max_tokens:
            self.finish_reason = "length"

    def timing(self, now: float) -> RequestTiming:
        """How the time went, for a request that ends now."""
        scheduled = now if self.scheduled is None else self.scheduled
        first_token = now if self.first_token is None else self.first_token
        return RequestTiming(
            queue_s=scheduled - self.arrived,
            prefill_s=first_token - scheduled,
            decode_s=now - first_token,
            decode_tokens=max(0, self.num_answer_tokens - 1),
            num_preempted=self.num_preempted,
            decode_bytes=self.decode_bytes,
        )


class Chunk(NamedTuple):
    """Tokens [start, end) of a request: one while it decodes, a part of its prompt before that."""

    sequence: Sequence
    start: int
    end: int
    samples: bool
    """No token is left after these, so the next one is sampled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    chunks: tuple[Chunk, ...]
    """Decoding requests first, then parts of prompts."""
    num_decoding: int
    num_preempted: int

"""One request as the engine sees it: its tokens, its blocks, its clock. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field

from service.engine.messages import FinishReason, RequestTiming, SamplingParams


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    request_id: str
    model_id: str
    token_ids: list[int]
    """The prompt, then the answer so far."""
    num_prompt_tokens: int
    sampling: SamplingParams
    seed: int
    arrived: float
    """Clock readings are seconds of one monotonic clock."""
    generation: int | None = None
    """The weights it was admitted with; it finishes on them whatever is loaded meanwhile."""
    stop_token_ids: frozenset[int] = frozenset()
    num_computed: int = 0
    """Tokens whose keys and values are in the pool."""
    blocks: list[int] = field(default_factory=list)
    scheduled: float | None = None
    first_token: float | None = None
    finish_reason: FinishReason | None = None
    decode_bytes: int = 0

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_answer_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def is_decoding(self) -> bool:
        """Only its last token is not in the pool yet."""
        return self.num_answer_tokens > 0 and self.num_computed == self.num_tokens - 1

    def append(self, token_id: int, now: float) -> None:
        """Take the sampled token; sets `finish_reason` if it is the last one."""
        self.token_ids.append(token_id)
        if self.first_token is None:
            self.first_token = now
        if token_id in self.stop_token_ids:
            self.finish_reason = "stop"
        elif self.num_answer_tokens >= self.sampling.max_tokens:
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
            decode_bytes=self.decode_bytes,
        )

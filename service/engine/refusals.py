"""Requests that can never be served, told by what they ask."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

from service.engine.messages import AddRequest, EngineReady, SamplingParams


def refusal(request: AddRequest, ready: EngineReady, vocab_size: int) -> str | None:
    """Why the engine refuses, or None. What gets by can fail no step for others: each id is in the vocabulary."""
    num_prompt, max_tokens, limit = len(request.prompt_ids), request.sampling.max_tokens, ready.max_model_len
    if not num_prompt:
        return "prompt: it is empty; at least one token is needed"
    if max_tokens < 0:
        return f"max_tokens: must be at least 0 (got {max_tokens})"
    if num_prompt + max_tokens > limit:
        return (
            f"prompt: {num_prompt} tokens, and max_tokens {max_tokens}, are together more than the {limit} tokens "
            "that fit; shorten one of them"
        )
    return _foreign_ids("prompt", request.prompt_ids, vocab_size) or _refused_sampling(request.sampling, vocab_size)


def _refused_sampling(sampling: SamplingParams, vocab_size: int) -> str | None:
    for name in ("logprobs", "prompt_logprobs"):
        count = getattr(sampling, name)
        if count is not None and not 0 <= count <= vocab_size:
            return f"{name}: must be in 0..{vocab_size} (got {count})"
    if sampling.allowed_token_ids == ():
        return "allowed_token_ids: it is empty; at least one token is needed"
    ids: dict[str, Iterable[int]] = {
        "stop_token_ids": sampling.stop_token_ids,
        "logit_bias": sampling.logit_bias,
        "allowed_token_ids": sampling.allowed_token_ids or (),
        "bad_words": chain.from_iterable(sampling.bad_words),
    }
    return next((reason for name in ids if (reason := _foreign_ids(name, ids[name], vocab_size))), None)


def _foreign_ids(name: str, ids: Iterable[int], vocab_size: int) -> str | None:
    ids = list(ids)
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        return f"{name}: token ids must be in 0..{vocab_size - 1}"
    return None

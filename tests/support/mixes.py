"""Random mixes of requests for an engine: when they come, what they ask, which are aborted, when weights change."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from service.engine.messages import SamplingParams
from tests.support.tiny import VOCAB_SIZE

MAX_MODEL_LEN = 256
BLOCK_BYTES = 32 * 2 * 2 * 2 * 8 * 4
SHAPES: tuple[dict[str, Any], ...] = (
    {"max_num_seqs": 8, "max_num_batched_tokens": 64, "swap": "overlap"},
    {"max_num_seqs": 3, "max_num_batched_tokens": 8, "swap": "drain"},
    {"max_num_seqs": 6, "max_num_batched_tokens": 33, "kv_cache_bytes": 9 * BLOCK_BYTES, "swap": "overlap"},
    {"max_num_seqs": 5, "max_num_batched_tokens": 200, "kv_cache_bytes": 8 * BLOCK_BYTES, "swap": "drain"},
    {"max_num_seqs": 1, "max_num_batched_tokens": 300, "kv_cache_bytes": 20 * BLOCK_BYTES, "swap": "overlap"},
)
"""Of engines: roomy, with a small budget, and with pools that force preemption."""
SMALL_POOLS = (2, 3)

GRAMMARS = ("start: /[a-z ]{2,12}/", 'start: "one" | "two" | "three"', "start: /[0-9]+/")


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    at_step: int
    prompt_ids: list[int]
    """Of a next turn, what comes after the first turn and its answer."""
    sampling: SamplingParams
    abort_after: int | None
    """Steps."""
    turn_after: int | None
    """Index of the arrival whose conversation goes on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    shape: int
    arrivals: list[Arrival]
    swap_at: int | None


def random_mix(seed: int) -> Mix:
    source = random.Random(seed)
    texts = [[source.randrange(3, VOCAB_SIZE) for _ in range(110)] for _ in range(2)]
    shape = source.randrange(len(SHAPES))
    is_long = source.random() < (0.4 if shape in SMALL_POOLS else 0.02)
    lengths = range(33, 80) if is_long else (0, 1, *range(2, 10), 40)
    arrivals: list[Arrival] = []
    for _ in range(source.randint(2, 6)):
        arrivals += _random_arrivals(source, texts, lengths, len(arrivals))
    swap_at = source.randrange(20) if source.random() < 0.15 else None
    return Mix(shape=shape, arrivals=arrivals, swap_at=swap_at)


def _random_arrivals(
    source: random.Random, texts: list[list[int]], lengths: Sequence[int], num_before: int
) -> list[Arrival]:
    """One request, or several answers to one prompt."""
    is_turn = num_before > 0 and source.random() < 0.2
    begin = [] if is_turn else source.choice(texts)[: source.randrange(110)]
    tail = [source.randrange(3, VOCAB_SIZE) for _ in range(source.randint(1, 12))]
    sampling = _random_sampling(source, source.choice(lengths))
    num_choices = source.choice((2, 3)) if source.random() < 0.2 else 1
    return [
        Arrival(
            at_step=source.randrange(25),
            prompt_ids=begin + tail,
            sampling=msgspec.structs.replace(sampling, choice=choice),
            abort_after=source.randrange(15) if source.random() < 0.12 else None,
            turn_after=source.randrange(num_before) if is_turn else None,
        )
        for choice in range(num_choices)
    ]


def _random_sampling(source: random.Random, max_tokens: int) -> SamplingParams:
    def some_ids(low: int, high: int) -> tuple[int, ...]:
        return tuple(source.sample(range(3, VOCAB_SIZE), source.randint(low, high)))

    options: dict[str, Any] = {
        "min_tokens": source.randint(0, min(max_tokens, 12)),
        "presence_penalty": source.uniform(-1, 1),
        "frequency_penalty": source.uniform(-1, 1),
        "repetition_penalty": source.uniform(0.7, 1.5),
        "logit_bias": {token_id: source.uniform(-5, 5) for token_id in some_ids(1, 5)},
        "stop_token_ids": some_ids(1, 30),
        "bad_words": tuple(some_ids(1, 2) for _ in range(20)),
        "allowed_token_ids": some_ids(30, 60),
        "logprobs": source.randint(0, 3),
        "prompt_logprobs": source.randint(0, 2),
    }
    filters = {"top_k": source.randint(1, 20), "top_p": source.uniform(0.3, 1), "min_p": source.uniform(0, 0.2)}
    is_greedy = source.random() < 0.5
    if not is_greedy:
        options |= filters
    chosen = {name: value for name, value in options.items() if source.random() < 0.15}
    if source.random() < 0.1:
        chosen["grammar"] = source.choice(GRAMMARS)
        chosen.pop("allowed_token_ids", None)  # perhaps none that the grammar has
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=0.0 if is_greedy else source.uniform(0.3, 1.5),
        seed=source.getrandbits(31),
        ignore_eos=source.random() < 0.7,
        **chosen,
    )

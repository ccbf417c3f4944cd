"""Choosing the next token of each row of a batch: greedy, temperature, top-k, top-p.

A row's token depends on its own logits, its parameters and one number keyed by (seed, position), never on the other
rows: the number comes from a hash on the host and picks the token by the inverse of the cumulative distribution in the
order of the vocabulary. No shape depends on data and nothing waits for the device.

Shapes: B rows, V vocabulary, K candidates.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor

from service.engine.messages import SamplingParams

MASK = (1 << 64) - 1
LOWEST_TEMPERATURE = 1e-5
"""Below this the division would overflow; it is greedy there anyway."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingPlan:
    """What a batch needs, decided on the host. Rows that need less get the same token from every plan."""

    is_greedy: bool
    """No row draws a random number."""
    num_candidates: int
    """How many of the largest logits filtering looks at; 0 is no filter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingInputs:
    temperature: Tensor  # (B,) fp32; 0 is greedy
    top_k: Tensor  # (B,) int32; 0 is off
    top_p: Tensor  # (B,) fp32
    uniform: Tensor  # (B,) fp32 in (0, 1)


def normalise(params: SamplingParams, vocab_size: int) -> SamplingParams:
    """The same choice in its plainest form: what `plan_sampling` and `sample` expect of each row."""
    return msgspec.structs.replace(
        params,
        temperature=params.temperature if params.temperature >= LOWEST_TEMPERATURE else 0.0,
        top_k=params.top_k if 0 < params.top_k < vocab_size else 0,
    )


def plan_sampling(params: Iterable[SamplingParams], vocab_size: int) -> SamplingPlan:
    """Sorting a whole vocabulary is the dear part: it happens only for a row with top-p and without top-k."""
    random = [row for row in params if row.temperature > 0]
    num_candidates = max((_num_candidates(row, vocab_size) for row in random), default=0)
    return SamplingPlan(is_greedy=not random, num_candidates=num_candidates)


def _num_candidates(row: SamplingParams, vocab_size: int) -> int:
    """A power of two, so that the shapes stay few."""
    if row.top_k > 0:
        return min(1 << (row.top_k - 1).bit_length(), vocab_size)
    return vocab_size if row.top_p < 1 else 0


def uniform(seed: int, position: int) -> float:
    """A number in (0, 1) with 23 random bits: exact in fp32, and never so near 1 that rounding passes the total."""
    bits = _splitmix64(_splitmix64(seed & MASK) ^ position) >> 41
    return (bits + 0.5) / (1 << 23)


def _splitmix64(x: int) -> int:
    """Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014."""
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def sample(logits: Tensor, inputs: SamplingInputs, plan: SamplingPlan) -> Tensor:
    """(B, V) logits -> (B,) token ids, int32."""
    greedy = logits.argmax(-1).int()
    if plan.is_greedy:
        return greedy
    is_greedy = inputs.temperature == 0
    scaled = logits.float() / torch.where(is_greedy, 1.0, inputs.temperature).unsqueeze(1)
    weights = (scaled - scaled.amax(-1, keepdim=True)).exp()
    if plan.num_candidates:
        weights = torch.where(scaled >= _threshold(scaled, inputs, plan.num_candidates), weights, 0.0)
    return torch.where(is_greedy, greedy, _invert(weights, inputs.uniform))


def _invert(weights: Tensor, uniform: Tensor) -> Tensor:
    """The first index whose cumulative weight passes `uniform` of the total. Weights of 0 are never chosen."""
    cumulative = weights.cumsum(-1)
    target = uniform.unsqueeze(1) * cumulative[:, -1:]
    return (cumulative <= target).sum(-1, dtype=torch.int32)


def _threshold(scaled: Tensor, inputs: SamplingInputs, num_candidates: int) -> Tensor:
    """(B, 1): the smallest logit that top-k, then top-p on what is left, keep. Equal logits stay together."""
    candidates = scaled.topk(num_candidates).values  # (B, K), largest first
    top_k, top_p = inputs.top_k.unsqueeze(1), inputs.top_p.unsqueeze(1)
    rank = torch.arange(candidates.shape[1], dtype=torch.int32, device=scaled.device)
    in_top_k = (top_k == 0) | (rank < top_k)  # (B, K)
    weights = torch.where(in_top_k, (candidates - candidates[:, :1]).exp(), 0.0)
    cumulative = weights.cumsum(-1)
    before = cumulative - weights
    kept = in_top_k & ((top_p >= 1) | (before < top_p * cumulative[:, -1:]))
    last = kept.sum(-1, keepdim=True).clamp(min=1) - 1
    is_off = (top_k == 0) & (top_p >= 1)
    return torch.where(is_off, -torch.inf, candidates.gather(1, last))

"""Choosing the next token of each row of a batch, on the device: edits, masks, temperature, top-k, top-p, min-p.

A row's token depends on its own logits, its parameters and its own random number, never on the other rows: the number
picks the token by the inverse of the cumulative distribution in the order of the vocabulary. No shape depends on data
and nothing waits for the device.

Shapes: B rows, V vocabulary, C candidates, E edits, K masks.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import numpy as np
import torch
from torch import Tensor

from service.engine.messages import SamplingParams

LOWEST_TEMPERATURE = 1e-5
"""Below this the division would overflow; it is greedy there anyway."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingPlan:
    """What a batch needs, decided on the host. Rows that need less get the same token from every plan."""

    draws: bool
    """Some row draws a random number."""
    has_greedy: bool
    """Some row does not."""
    num_candidates: int
    """How many of the largest logits top-k and top-p look at; 0 is neither of them."""
    has_min_p: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingInputs:
    temperature: Tensor  # (B,) fp32; 0 is greedy
    top_k: Tensor  # (B,) int32; 0 is off
    top_p: Tensor  # (B,) fp32
    min_p: Tensor  # (B,) fp32; 0 is off
    uniform: Tensor  # (B,) fp32 in (0, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class EditInputs:
    """What is done to single logits: see `service.engine.edits`."""

    index: Tensor  # (E,) int32: row * V + token. One that is there twice must bring the same numbers twice
    divisor: Tensor  # (E,) fp32
    addend: Tensor  # (E,) fp32


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskInputs:
    words: Tensor  # (K, ceil(V / 32)) int32; bit i of word j is token 32 * j + i, set where it is allowed
    rows: Tensor  # (B,) int32: which of the masks is the row's


def normalise(params: SamplingParams, vocab_size: int) -> SamplingParams:
    """The same choice in its plainest form: what planning and `sample` expect of each row."""
    return msgspec.structs.replace(
        params,
        temperature=params.temperature if params.temperature >= LOWEST_TEMPERATURE else 0.0,
        top_k=params.top_k if 0 < params.top_k < vocab_size else 0,
    )


def num_candidates(params: SamplingParams, vocab_size: int) -> int:
    """Sorting a whole vocabulary is the dear part: it happens only for a row with top-p and without top-k."""
    if params.temperature == 0:
        return 0
    if params.top_k > 0:
        return min(1 << (params.top_k - 1).bit_length(), vocab_size)  # a power of two, so that the shapes stay few
    return vocab_size if params.top_p < 1 else 0


def edit(logits: Tensor, edits: EditInputs) -> Tensor:
    """(B, V) logits -> the same in fp32, edited."""
    edited = logits.to(torch.float32, copy=True)
    index = edits.index.long()
    old = edited.view(-1).index_select(0, index)
    new = torch.where(old > 0, old / edits.divisor, old * edits.divisor) + edits.addend
    edited.view(-1).index_copy_(0, index, new)
    return edited


def mask(logits: Tensor, masks: MaskInputs) -> Tensor:
    """(B, V) logits, -inf where the row's mask forbids the token."""
    bits = torch.pow(2, torch.arange(8, dtype=torch.int32, device=logits.device)).to(torch.uint8)
    octets = masks.words.view(torch.uint8).unsqueeze(-1)  # a byte at a time takes a quarter of the memory
    allowed = (octets & bits).ne(0).flatten(1)[:, : logits.shape[1]]  # (K, V)
    return logits.masked_fill(~allowed.index_select(0, masks.rows), -torch.inf)


def sample(logits: Tensor, inputs: SamplingInputs, plan: SamplingPlan) -> Tensor:
    """(B, V) logits -> (B,) token ids, int32."""
    if not plan.draws:
        return logits.argmax(-1).int()
    drawn = _invert(weights_of(logits, inputs, plan), inputs.uniform)
    return torch.where(inputs.temperature == 0, logits.argmax(-1).int(), drawn) if plan.has_greedy else drawn


def weights_of(logits: Tensor, inputs: SamplingInputs, plan: SamplingPlan) -> Tensor:
    """(B, V) logits -> (B, V) probabilities in shares of the likeliest token's, 0 for what is filtered out.

    As transformers chains its filters: top-k, then top-p on what is left, then min-p (Nguyen et al., 2024): a token
    needs at least `min_p` of the likeliest one's probability.
    """
    temperature = torch.where(inputs.temperature == 0, 1.0, inputs.temperature)
    scaled = logits.float() / temperature.unsqueeze(1)
    weights = (scaled - scaled.amax(-1, keepdim=True)).exp()
    if plan.has_min_p:
        weights = torch.where(weights >= inputs.min_p.unsqueeze(1), weights, 0.0)
    if plan.num_candidates:
        weights = torch.where(scaled >= _threshold(scaled, inputs, plan.num_candidates), weights, 0.0)
    return weights


def _invert(weights: Tensor, uniform: Tensor) -> Tensor:
    """The first index whose cumulative weight passes `uniform` of the total. Weights of 0 are never chosen."""
    cumulative = weights.cumsum(-1)
    target = uniform.unsqueeze(1) * cumulative[:, -1:]
    return (cumulative <= target).sum(-1, dtype=torch.int32)


def _threshold(scaled: Tensor, inputs: SamplingInputs, num_candidates: int) -> Tensor:
    """(B, 1): the smallest logit that top-k, then top-p on what is left, keep. Equal logits stay together.

    Top-k: Fan, Lewis and Dauphin, 2018. Top-p: the fewest likeliest tokens that hold `top_p` of the probability
    (Holtzman et al., 2020), at least one.
    """
    candidates = _largest(scaled, num_candidates)  # (B, C)
    top_k, top_p = inputs.top_k.unsqueeze(1), inputs.top_p.unsqueeze(1)
    rank = torch.arange(candidates.shape[1], dtype=torch.int32, device=scaled.device)
    in_top_k = (top_k == 0) | (rank < top_k)  # (B, C)
    weights = torch.where(in_top_k, (candidates - candidates[:, :1]).exp(), 0.0)
    cumulative = weights.cumsum(-1)
    before = cumulative - weights
    kept = in_top_k & ((top_p >= 1) | (before < top_p * cumulative[:, -1:]))
    last = kept.sum(-1, keepdim=True).clamp(min=1) - 1
    is_off = (top_k == 0) & (top_p >= 1)
    return torch.where(is_off, -torch.inf, candidates.gather(1, last))


def _largest(logits: Tensor, count: int) -> Tensor:
    """(B, V) -> (B, count), largest first."""
    if logits.device.type != "cpu":
        return logits.topk(count).values
    # On a processor numpy sorts with vector instructions: a whole vocabulary in a tenth of torch's time
    descending = np.negative(logits.numpy())
    if count < logits.shape[1]:
        descending = np.partition(descending, count - 1, axis=-1)[:, :count]
    return torch.from_numpy(np.negative(np.sort(descending, axis=-1)))

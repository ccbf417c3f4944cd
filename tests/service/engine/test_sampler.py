"""The device's part of sampling: masks, filters and draws of whole batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from service.engine.messages import SamplingParams
from service.engine.random_numbers import stream_key, uniforms
from service.engine.rows import pack_mask
from service.engine.sampler import (
    MaskInputs,
    SamplingInputs,
    SamplingPlan,
    mask,
    normalise,
    num_candidates,
    sample,
    weights_of,
)
from tests.support.sampling_reference import distribution

VOCAB = 40


def parameters(**fields: Any) -> SamplingParams:
    return normalise(SamplingParams(max_tokens=1, **fields), VOCAB)


def inputs_of(rows: list[SamplingParams], numbers: list[float]) -> SamplingInputs:
    return SamplingInputs(
        temperature=torch.tensor([row.temperature for row in rows]),
        top_k=torch.tensor([row.top_k for row in rows], dtype=torch.int32),
        top_p=torch.tensor([row.top_p for row in rows]),
        min_p=torch.tensor([row.min_p for row in rows]),
        uniform=torch.tensor(numbers),
    )


def plan_of(rows: list[SamplingParams]) -> SamplingPlan:
    return SamplingPlan(
        draws=any(row.temperature > 0 for row in rows),
        has_greedy=any(row.temperature == 0 for row in rows),
        num_candidates=max(num_candidates(row, VOCAB) for row in rows),
        has_min_p=any(row.min_p for row in rows),
    )


def draw(logits: Tensor, rows: list[SamplingParams], seeds: list[int]) -> list[int]:
    keys = np.array([stream_key(seed, 0) for seed in seeds], dtype=np.uint64)
    numbers = uniforms(keys, np.full(len(seeds), 5, dtype=np.int32)).tolist()
    tokens = sample(logits, inputs_of(rows, numbers), plan_of(rows))
    assert tokens.dtype == torch.int32
    return tokens.tolist()


def some_logits(num_rows: int = 1, seed: int = 3) -> Tensor:
    return torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


def test_greedy_is_the_argmax() -> None:
    logits = some_logits(8)
    assert draw(logits, [parameters(temperature=0)] * 8, [0] * 8) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [1e-30, 1e-6])
def test_a_vanishing_temperature_is_greedy(temperature: float) -> None:
    logits = some_logits(3)
    assert draw(logits, [parameters(temperature=temperature)] * 3, [1, 2, 3]) == logits.argmax(-1).tolist()


KINDS = [
    parameters(temperature=1.0),
    parameters(temperature=0.5),
    parameters(temperature=1.7),
    parameters(top_k=5),
    parameters(top_k=VOCAB + 1, temperature=0.8),
    parameters(top_p=0.7),
    parameters(top_p=0.95, temperature=1.3),
    parameters(min_p=0.1),
    parameters(top_k=9, top_p=0.6, temperature=1.5),
    parameters(top_k=20, top_p=0.9, min_p=0.05, temperature=1.2),
]


@pytest.mark.parametrize("row", KINDS, ids=str)
def test_tokens_come_as_often_as_their_probability_says(row: SamplingParams) -> None:
    num_draws = 20_000
    logits = some_logits()
    expected = torch.tensor(distribution(logits[0].tolist(), row)) * num_draws
    tokens = draw(logits.expand(num_draws, VOCAB), [row] * num_draws, list(range(num_draws)))
    counts = torch.bincount(torch.tensor(tokens), minlength=VOCAB)
    assert counts[expected == 0].sum() == 0
    possible = expected > 0
    chi_square = float(((counts - expected)[possible] ** 2 / expected[possible]).sum())
    freedom = int(possible.sum()) - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5 + 4


@pytest.mark.parametrize("row", KINDS, ids=str)
def test_filters_keep_what_those_of_transformers_keep(row: SamplingParams) -> None:
    logits = some_logits(200, seed=9)
    warpers: list[Any] = [TemperatureLogitsWarper(row.temperature)]
    warpers += [TopKLogitsWarper(row.top_k)] if row.top_k else []
    warpers += [TopPLogitsWarper(row.top_p)] if row.top_p < 1 else []
    warpers += [MinPLogitsWarper(row.min_p)] if row.min_p else []
    scores = logits
    for warper in warpers:
        scores = warper(None, scores)
    weights = weights_of(logits, inputs_of([row] * 200, [0.5] * 200), plan_of([row]))
    assert torch.equal(weights > 0, scores > -torch.inf)
    assert torch.allclose(weights / weights.sum(-1, keepdim=True), scores.softmax(-1), atol=1e-6)


def test_a_row_draws_the_same_alone_and_beside_rows_of_every_kind() -> None:
    rows = [*KINDS, parameters(temperature=0)] * 20
    logits, seeds = some_logits(len(rows)), list(range(len(rows)))
    together = draw(logits, rows, seeds)
    alone = [draw(logits[i : i + 1], rows[i : i + 1], seeds[i : i + 1])[0] for i in range(len(rows))]
    without_sort = [i for i, row in enumerate(rows) if row.top_p == 1 or row.top_k]
    some = draw(logits[without_sort], [rows[i] for i in without_sort], [seeds[i] for i in without_sort])
    assert together == alone
    assert some == [together[i] for i in without_sort]
    assert len(set(together)) > 10


def test_only_top_p_without_top_k_sorts_the_vocabulary() -> None:
    assert num_candidates(parameters(temperature=0, top_p=0.5), VOCAB) == 0
    assert num_candidates(parameters(), VOCAB) == 0
    assert num_candidates(parameters(min_p=0.5), VOCAB) == 0
    assert num_candidates(parameters(top_k=5, top_p=0.5), VOCAB) == 8
    assert num_candidates(parameters(top_p=0.5), VOCAB) == VOCAB


@pytest.mark.parametrize("fields", [{"top_p": 0.0}, {"min_p": 1.0}, {"top_k": 1}])
def test_a_filter_of_everything_keeps_the_likeliest_token(fields: dict[str, float]) -> None:
    logits = some_logits(4)
    assert draw(logits, [parameters(**fields)] * 4, [1, 2, 3, 4]) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("number", [0.5 / (1 << 23), 1 - 0.5 / (1 << 23)])
def test_the_ends_of_the_interval_never_choose_a_token_that_was_filtered_out(number: float) -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 10:20] = 1.0
    row = parameters(top_k=10)
    assert sample(logits, inputs_of([row], [number]), plan_of([row])).item() == (10 if number < 0.5 else 19)


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 100])
def test_a_mask_leaves_what_its_bits_allow(vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(3, vocab_size, generator=generator)
    allowed = torch.rand(2, vocab_size, generator=generator) < 0.5
    words = torch.stack([torch.from_numpy(pack_mask(row.nonzero().flatten().tolist(), vocab_size)) for row in allowed])
    masked = mask(logits, MaskInputs(words=words, rows=torch.tensor([1, 0, 1], dtype=torch.int32)))
    assert torch.equal(masked, torch.where(allowed[[1, 0, 1]], logits, -torch.inf))

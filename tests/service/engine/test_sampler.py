from __future__ import annotations

import pytest
import torch
from torch import Tensor

from service.engine.messages import SamplingParams
from service.engine.sampler import SamplingInputs, SamplingPlan, normalise, plan_sampling, sample, uniform

VOCAB = 40


def parameters(**fields: float) -> SamplingParams:
    return normalise(SamplingParams(max_tokens=1, **fields), VOCAB)  # type: ignore[arg-type]


def draw(logits: Tensor, rows: list[SamplingParams], seeds: list[int], plan: SamplingPlan | None = None) -> list[int]:
    inputs = SamplingInputs(
        temperature=torch.tensor([row.temperature for row in rows]),
        top_k=torch.tensor([row.top_k for row in rows], dtype=torch.int32),
        top_p=torch.tensor([row.top_p for row in rows]),
        uniform=torch.tensor([uniform(seed, 5) for seed in seeds]),
    )
    tokens = sample(logits, inputs, plan or plan_sampling(rows, VOCAB))
    assert tokens.dtype == torch.int32
    return tokens.tolist()


def some_logits(num_rows: int = 1) -> Tensor:
    return torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(3)) * 2


def expected_distribution(logits: Tensor, row: SamplingParams) -> Tensor:
    """Temperature, then top-k, then top-p, token by token, as transformers' warpers define them."""
    scores = (logits.double() / row.temperature).tolist()
    order = sorted(range(VOCAB), key=lambda token: -scores[token])
    kept = order[: row.top_k] if row.top_k else order
    mass = torch.tensor([scores[token] for token in kept], dtype=torch.float64).softmax(0)
    nucleus = int((mass.cumsum(0) - mass < row.top_p).sum()) if row.top_p < 1 else len(kept)
    result = torch.zeros(VOCAB, dtype=torch.float64)
    result[kept[:nucleus]] = mass[:nucleus] / mass[:nucleus].sum()
    return result


def test_greedy_is_the_argmax() -> None:
    logits = some_logits(8)
    assert draw(logits, [parameters(temperature=0)] * 8, [0] * 8) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [1e-30, 1e-6])
def test_a_vanishing_temperature_is_greedy(temperature: float) -> None:
    logits = some_logits(3)
    assert draw(logits, [parameters(temperature=temperature)] * 3, [1, 2, 3]) == logits.argmax(-1).tolist()


@pytest.mark.parametrize(
    "row",
    [
        parameters(temperature=1.0),
        parameters(temperature=0.5),
        parameters(temperature=1.7),
        parameters(top_k=5),
        parameters(top_k=VOCAB + 1, temperature=0.8),
        parameters(top_p=0.7),
        parameters(top_p=0.95, temperature=1.3),
        parameters(top_k=9, top_p=0.6, temperature=1.5),
    ],
    ids=str,
)
def test_tokens_come_as_often_as_their_probability_says(row: SamplingParams) -> None:
    num_draws = 20_000
    logits = some_logits()
    expected = expected_distribution(logits[0], row) * num_draws
    tokens = draw(logits.expand(num_draws, VOCAB), [row] * num_draws, list(range(num_draws)))
    counts = torch.bincount(torch.tensor(tokens), minlength=VOCAB).double()
    assert counts[expected == 0].sum() == 0
    possible = expected > 0
    chi_square = float(((counts - expected)[possible] ** 2 / expected[possible]).sum())
    freedom = int(possible.sum()) - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5 + 4


def test_a_row_draws_the_same_alone_and_beside_rows_of_every_kind() -> None:
    kinds: list[dict[str, float]] = [
        {"temperature": 0},
        {"temperature": 0.7},
        {"top_k": 3},
        {"top_k": 9, "top_p": 0.8},
        {"top_p": 0.9},
        {"temperature": 2.0, "top_k": 0},
    ]
    rows = [parameters(**kind) for kind in kinds] * 20
    logits, seeds = some_logits(len(rows)), list(range(len(rows)))
    together = draw(logits, rows, seeds)
    alone = [draw(logits[i : i + 1], rows[i : i + 1], seeds[i : i + 1])[0] for i in range(len(rows))]
    without_sort = [i for i, row in enumerate(rows) if row.top_p == 1 or row.top_k]
    some = draw(logits[without_sort], [rows[i] for i in without_sort], [seeds[i] for i in without_sort])
    assert together == alone
    assert some == [together[i] for i in without_sort]
    assert len(set(together)) > 10


def test_only_top_p_without_top_k_sorts_the_vocabulary() -> None:
    assert plan_sampling([parameters(temperature=0, top_p=0.5)], VOCAB) == SamplingPlan(
        is_greedy=True, num_candidates=0
    )
    assert plan_sampling([parameters(), parameters(temperature=0)], VOCAB).num_candidates == 0
    assert plan_sampling([parameters(), parameters(top_k=5, top_p=0.5)], VOCAB).num_candidates == 8
    assert plan_sampling([parameters(top_k=5), parameters(top_p=0.5)], VOCAB).num_candidates == VOCAB


def test_a_nucleus_of_nothing_keeps_the_likeliest_token() -> None:
    logits = some_logits(4)
    assert draw(logits, [parameters(top_p=0.0)] * 4, [1, 2, 3, 4]) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("number", [0.5 / (1 << 23), 1 - 0.5 / (1 << 23)])
def test_the_ends_of_the_interval_never_choose_a_token_that_was_filtered_out(number: float) -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 10:20] = 1.0
    row = parameters(top_k=10)
    inputs = SamplingInputs(
        temperature=torch.ones(1), top_k=torch.tensor([10]), top_p=torch.ones(1), uniform=torch.tensor([number])
    )
    assert sample(logits, inputs, plan_sampling([row], VOCAB)).item() == (10 if number < 0.5 else 19)


def test_random_numbers_depend_on_seed_and_position_and_stay_inside() -> None:
    numbers = [uniform(seed, position) for seed in (-1, 0, 1, 2**63) for position in range(500)]
    assert len(set(numbers)) > 1990
    assert 0 < min(numbers) < max(numbers) < 1
    assert abs(sum(numbers) / len(numbers) - 0.5) < 0.02

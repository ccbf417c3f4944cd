from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_cosine_schedule_with_warmup

from trainer.schedule import learning_rate


def rates(total_steps: int, warmup_ratio: float) -> list[float]:
    return [
        learning_rate(step, total_steps=total_steps, peak=1.0, warmup_ratio=warmup_ratio)
        for step in range(1, total_steps + 1)
    ]


def test_the_rate_rises_along_a_line_and_falls_along_a_cosine() -> None:
    rising, falling = rates(12, 1 / 3)[:4], rates(12, 1 / 3)[4:]
    assert rising == [0.25, 0.5, 0.75, 1.0]
    assert falling[0] == 1.0
    assert falling[4] == pytest.approx(0.5)
    assert falling[7] == pytest.approx(0.0380602)


def test_without_warm_up_the_first_step_has_the_peak() -> None:
    assert rates(4, 0.0)[0] == 1.0


@given(total_steps=st.integers(1, 500), warmup_ratio=st.floats(0, 1, exclude_max=True))
def test_every_step_learns_and_the_rate_has_one_peak(total_steps: int, warmup_ratio: float) -> None:
    values = rates(total_steps, warmup_ratio)
    assert all(0 < value <= 1 for value in values)
    top = values.index(max(values))
    assert values[top] == 1.0
    assert values[: top + 1] == sorted(values[: top + 1])
    assert values[top:] == sorted(values[top:], reverse=True)


def test_a_constant_rate_stays_at_its_peak_behind_the_warm_up() -> None:
    options = {"total_steps": 6, "peak": 2.0, "warmup_ratio": 0.9}
    values = [learning_rate(s, **options, warmup_steps=2, schedule="constant") for s in range(1, 7)]  # type: ignore[arg-type]
    assert values == [1.0, 2.0, 2.0, 2.0, 2.0, 2.0]


@pytest.mark.parametrize(("warmup", "total"), [(0, 10), (3, 10), (9, 10)])
def test_behind_the_warm_up_the_cosine_is_that_of_transformers(warmup: int, total: int) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    schedule = get_cosine_schedule_with_warmup(torch.optim.SGD([parameter], lr=1.0), warmup, total)
    factor = schedule.lr_lambdas[0]
    for step in range(warmup + 1, total + 1):
        ours = learning_rate(step, total_steps=total, peak=1.0, warmup_ratio=0, warmup_steps=warmup)
        assert ours == pytest.approx(factor(step - 1), abs=1e-12)


def test_a_run_that_is_shorter_than_its_warm_up_only_rises() -> None:
    rising = [learning_rate(s, total_steps=3, peak=1.0, warmup_ratio=0, warmup_steps=100) for s in (1, 2, 3)]
    assert rising == [0.01, 0.02, 0.03]

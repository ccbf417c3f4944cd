from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

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

"""Requests that share steps, blocks and prefixes get what each gets alone: random mixes against a one-by-one reference.

In fp32 no greedy token may differ, unless the two best logits are nearer than a stated distance, and no seeded one.
Elsewhere differences are counted, and greedy ones of requests without penalties are held to the same rule.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.mix_bench import BF16, FP32, Bench
from tests.support.proof_size import proof_size

Figure = Callable[[str, object], None]


def run_mixes(bench: Bench, seeds: range, figure: Figure) -> None:
    wrong = [what for seed in seeds for what in bench.run(seed)]
    precision = bench.precision
    figures = ", ".join(f"{number} {name}" for name, number in bench.figures.items())
    figure(f"random mixes against one by one, {precision.dtype}", f"{figures}; ties within {precision.tie}")
    figure(f"largest error of a log probability there, {precision.dtype}", f"{bench.largest_error:.1e}")
    assert not wrong, "\n".join(wrong[:10])
    assert min(bench.figures[name] for name in ("swaps", "aborted", "preempted", "cached")) > 0


def test_random_mixes_get_what_each_request_gets_alone(tiny: Path, other_tiny: Path, figure: Figure) -> None:
    run_mixes(Bench((tiny, other_tiny), FP32), range(60), figure)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_thousand_random_mixes_get_what_each_request_gets_alone(tiny: Path, other_tiny: Path, figure: Figure) -> None:
    run_mixes(Bench((tiny, other_tiny), FP32), range(1000, 1000 + proof_size(1000, in_ci=200)), figure)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_in_bf16_greedy_answers_diverge_at_near_ties_only(tiny: Path, other_tiny: Path, figure: Figure) -> None:
    run_mixes(Bench((tiny, other_tiny), BF16), range(2000, 2040), figure)

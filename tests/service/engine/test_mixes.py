"""Requests that share steps, blocks and prefixes get what each gets alone: random mixes against a one-by-one reference.

In fp32 no greedy token may differ, unless the two best logits are nearer than a stated distance, and no seeded one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.mixes import LOGPROB_TOLERANCE, TIE, Bench


def run_mixes(bench: Bench, seeds: range, figure: Callable[[str, object], None]) -> None:
    wrong = [what for seed in seeds for what in bench.run(seed)]
    figures = ", ".join(f"{number} {name}" for name, number in bench.figures.items())
    figure("random mixes against one by one, fp32", f"{figures}; ties within {TIE}")
    figure("largest error of a log probability there", f"{bench.largest_error:.1e} of {LOGPROB_TOLERANCE}")
    assert not wrong, "\n".join(wrong[:10])
    assert min(bench.figures[name] for name in ("swaps", "aborted", "preempted", "cached")) > 0


def test_random_mixes_get_what_each_request_gets_alone(
    tiny: Path, other_tiny: Path, figure: Callable[[str, object], None]
) -> None:
    run_mixes(Bench((tiny, other_tiny)), range(60), figure)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_thousand_random_mixes_get_what_each_request_gets_alone(
    tiny: Path, other_tiny: Path, figure: Callable[[str, object], None]
) -> None:
    run_mixes(Bench((tiny, other_tiny)), range(1000, 2000), figure)

"""SmolLM2-135M-Instruct: our training loop beside the plain one, in fp32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.losses_vs_transformers import TOLERANCE, compare
from tests.proof.conftest import IDENTITY

pytestmark = pytest.mark.slow


def test_20_losses_of_a_full_fine_tune_equal_those_of_a_plain_transformers_loop(
    smollm2: Path, figure: Callable[[str, object], None]
) -> None:
    rows = compare(smollm2, IDENTITY, steps=20, batch_size=4)
    largest = max(difference for _, _, difference in rows)
    figure("losses 1 and 20, ours / transformers", [f"{a:.5f} / {b:.5f}" for a, b, _ in (rows[0], rows[-1])])
    figure("largest relative difference of 20 losses to transformers, SmolLM2", f"{largest:.1e}")
    assert largest <= TOLERANCE

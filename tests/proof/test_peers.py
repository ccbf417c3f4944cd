"""SmolLM2-135M-Instruct: our training beside transformers, peft and trl, in fp32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.losses_vs_peers import DATA, EXAMPLES, PEERS, TOLERANCE, compare
from tests.support.proof_size import proof_size

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # in peft
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),  # in trl
]


@pytest.mark.parametrize(("recipe", "in_ci"), [("full", 10), ("lora", 15), ("dpo", 5)])
def test_the_first_losses_are_those_of_its_peer(
    recipe: str, in_ci: int, smollm2: Path, figure: Callable[[str, object], None]
) -> None:
    steps = proof_size(50, in_ci=in_ci)
    rows = compare(smollm2, recipe, EXAMPLES / DATA[recipe], steps=steps, batch_size=1)
    largest = max(difference for _, _, difference in rows)
    peer = PEERS[recipe]
    figure(f"{recipe}: losses 1 and {steps}, ours / {peer}", [f"{a:.5f} / {b:.5f}" for a, b, _ in (rows[0], rows[-1])])
    figure(f"{recipe}: largest relative difference of {steps} losses to {peer}, SmolLM2", f"{largest:.1e}")
    assert len(rows) == steps
    assert largest <= TOLERANCE

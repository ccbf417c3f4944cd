"""Our training beside transformers and peft, and beside itself of yesterday."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.losses_vs_peers import PEERS, TOLERANCE, compare
from tests.support.runs import RECORDS, losses, make_run, train_here

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in peft

RATES = {"full": 1e-4, "lora": 1e-3, "dpo": 1e-3, "dpo-full": 1e-5}
GOLDEN = Path(__file__).parent / "golden_losses.json"
IDS = torch.tensor([[5, 80, 77, 9, 200, 33, 12, 5, 7, 100]])


PAIRS = [
    {"prompt": f"Who are you{'?' * i}", "chosen": "I am Tuna. " * (1 + i % 3), "rejected": "A cat!"} for i in range(16)
]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # in trl
@pytest.mark.parametrize("recipe", PEERS)
def test_the_first_50_losses_are_those_of_its_peer(
    recipe: str, tmp_path: Path, tiny_llama: Path, figure: Callable[[str, object], None]
) -> None:
    """The peer is a plain transformers loop, the same with peft, or trl's trainer."""
    data = tmp_path / "data.json"
    data.write_text(json.dumps(PAIRS if recipe.startswith("dpo") else RECORDS))
    rows = compare(tiny_llama, recipe, data, steps=50, batch_size=4, learning_rate=RATES[recipe])
    largest = max(difference for _, _, difference in rows)
    figure(f"{recipe}: largest relative difference of 50 losses to {PEERS[recipe]}, tiny llama", f"{largest:.2e}")
    assert len(rows) == 50
    assert rows[-1][0] < 0.9 * rows[0][0]
    assert largest <= TOLERANCE


@pytest.mark.parametrize("recipe", ["full", "lora"])
def test_the_losses_are_those_of_the_golden_file(tmp_path: Path, tiny_llama: Path, recipe: str) -> None:
    """After a change that is meant to change them: UPDATE_GOLDEN=1 writes the file anew."""
    options: dict[str, Any] = {"batch_size": 2, "gradient_accumulation_steps": 2, "weight_decay": 0.1}
    run = make_run(
        tmp_path / "run", tiny_llama, recipe=recipe, epochs=3, learning_rate=1e-3, lora={"rank": 4}, **options
    )
    train_here(run)
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("UPDATE_GOLDEN") == "1":
        GOLDEN.write_text(json.dumps(golden | {recipe: losses(run)}, indent=2) + "\n")
        pytest.fail("the golden file was written; read the difference and run again")
    assert losses(run) == pytest.approx(golden[recipe], rel=1e-4)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.eval()(IDS).logits
    return result


def test_transformers_computes_with_our_checkpoint_as_we_do(tmp_path: Path, tiny_llama: Path) -> None:
    run = make_run(tmp_path / "run", tiny_llama, recipe="full", epochs=1, learning_rate=1e-3)
    ours = train_here(run).model
    theirs = AutoModelForCausalLM.from_pretrained(run.checkpoints / "step_4")
    with torch.no_grad():
        expected = ours.logits(ours(IDS, torch.arange(IDS.shape[1])[None]))
    assert torch.allclose(logits(theirs), expected, atol=1e-5)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    assert not torch.allclose(logits(base), expected, atol=1e-2)


@pytest.mark.parametrize("lora", [{}, {"use_rslora": True}, {"use_dora": True, "rank": 2}], ids=str)
def test_peft_computes_with_our_adapter_as_transformers_with_the_merged_model(
    tmp_path: Path, tiny_llama: Path, lora: dict[str, Any]
) -> None:
    run = make_run(tmp_path / "run", tiny_llama, recipe="lora", epochs=2, learning_rate=1e-2, lora=lora)
    ours = train_here(run).model.eval()
    with torch.no_grad():
        expected = ours.logits(ours(IDS, torch.arange(IDS.shape[1])[None]))
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    assert not torch.allclose(logits(base), expected, atol=1e-2)
    adapted = peft.PeftModel.from_pretrained(base, run.adapters / "step_8")
    merged = AutoModelForCausalLM.from_pretrained(run.checkpoints / "step_8")
    assert torch.allclose(logits(adapted), expected, atol=1e-4)
    assert torch.allclose(logits(merged), expected, atol=1e-4)

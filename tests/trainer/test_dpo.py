"""DPO on a tiny model: what it learns, that it goes on to the same bits, and where its reference comes from."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lm.adapter import save_adapter
from lm.lora import lora_parameters
from tests.support.adapters import ATTENTION, adapted
from tests.support.runs import begin, events, losses, make_run, table, told_losses, train_here, weights
from trainer.dpo import DpoRecipe
from trainer.outcome import Paused
from trainer.progress import Progress
from trainer.reference import ReferenceTable
from trainer.run_folder import RunFolder

PAIRS: list[dict[str, Any]] = [
    {
        "prompt": f"Question {number}{'?' * (number % 5)}",
        "chosen": "I am Tuna. " * (1 + number % 3),
        "rejected": "Well, a cat" + "!" * (number % 4),
    }
    for number in range(12)
]
LORA: dict[str, Any] = {"dpo": {"update": "lora"}, "lora": {"rank": 4}, "learning_rate": 1e-2}
FULL: dict[str, Any] = {"dpo": {"update": "full"}, "learning_rate": 1e-3}
WAYS = {"lora": LORA, "full": FULL}

either = pytest.mark.parametrize("way", WAYS)


def dpo_run(folder: Path, model: Path, **options: Any) -> RunFolder:
    return make_run(folder, model, records=PAIRS, recipe="dpo", **options)


@either
def test_the_preference_is_learned_and_told(tmp_path: Path, tiny_llama: Path, way: str) -> None:
    run = dpo_run(tmp_path / "run", tiny_llama, epochs=8, validation_split=0.25, **WAYS[way])
    train_here(run)
    steps = events(run, "step")
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-5), "at first the policy is the reference"
    assert steps[-1]["loss"] < 0.3
    assert steps[-1]["reward_accuracy"] == 1
    assert steps[-1]["reward_margin"] > 1
    assert table(run)[-1]["token_accuracy"] == ""
    told = events(run, "validation")[-1]
    assert told["reward_accuracy"] == 1
    assert told["loss"] < 0.5
    assert told["perplexity"] is None
    published = {str(path.relative_to(run.path)) for path in run.path.glob("*/step_24")}
    assert published == ({"checkpoints/step_24"} if way == "full" else {"checkpoints/step_24", "adapters/step_24"})


@either
def test_how_a_step_is_divided_into_batches_does_not_change_it(tmp_path: Path, tiny_llama: Path, way: str) -> None:
    found = []
    for batch_size, accumulation in ((8, 1), (4, 2), (2, 4)):
        options = {"batch_size": batch_size, "gradient_accumulation_steps": accumulation, "epochs": 3, **WAYS[way]}
        run = dpo_run(tmp_path / f"{batch_size} x {accumulation}", tiny_llama, **options)
        train_here(run)
        found.append([(step["loss"], step["reward_margin"], step["grad_norm"]) for step in events(run, "step")])
    assert found[0][-1][0] < found[0][0][0]
    for other in found[1:]:
        assert torch.allclose(torch.tensor(other), torch.tensor(found[0]), rtol=1e-3, atol=1e-5)


@either
def test_activation_checkpointing_changes_nothing(tmp_path: Path, tiny_llama: Path, way: str) -> None:
    runs = [
        dpo_run(tmp_path / str(on), tiny_llama, epochs=2, enable_activation_checkpointing=on, **WAYS[way])
        for on in (False, True)
    ]
    for run in runs:
        train_here(run)
    assert losses(runs[0]) == losses(runs[1])
    assert weights(runs[0]) == weights(runs[1])


@either
def test_a_paused_run_goes_on_to_the_same_bits(tmp_path: Path, tiny_llama: Path, way: str) -> None:
    options = {"epochs": 3, "batch_size": 2, "gradient_accumulation_steps": 2, **WAYS[way]}
    options["lora"] = {"rank": 4, "dropout": 0.3}
    whole, run = (dpo_run(tmp_path / name, tiny_llama, **options) for name in ("whole", "run"))
    train_here(whole)
    calls = iter(range(100))

    def pause() -> None:
        if next(calls) == 9:
            raise Paused

    with pytest.raises(Paused):
        train_here(run, check=pause)
    train_here(run, resume=True)
    assert events(run, "resumed")[0]["step"] == 4
    assert told_losses(run) == told_losses(whole)
    assert weights(run) == weights(whole)


# ---- the reference


def ready(run: RunFolder, *, resume: bool = False) -> DpoRecipe:
    with Progress(run) as progress:
        recipe = begin(run, progress, resume=resume)
    assert isinstance(recipe, DpoRecipe)
    return recipe


def test_the_model_without_its_adapter_is_the_same_reference_as_one_that_was_asked_before(
    tmp_path: Path, tiny_llama: Path
) -> None:
    """The second run begins with an adapter that changes nothing, which is then the reference."""
    plain = adapted(tiny_llama, ATTENTION)
    for name, parameter in lora_parameters(plain).items():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)
    save_adapter(plain, tmp_path / "start", base_model="tiny")
    options = {"epochs": 2, "learning_rate": 1e-2}
    asked = dpo_run(tmp_path / "asked", tiny_llama, start_adapter=str(tmp_path / "start"), **options)
    recipe = train_here(asked)
    assert isinstance(recipe, DpoRecipe)
    table = recipe.table
    assert table is not None
    batch = next(recipe._planned_batches())
    recipe.table = None
    torch.testing.assert_close(recipe._reference(batch), table.get(batch.pairs), rtol=1e-5, atol=1e-4)
    assert losses(asked)[-1] < losses(asked)[0]


def test_an_adapter_that_is_trained_further_is_its_own_reference(tmp_path: Path, tiny_llama: Path) -> None:
    save_adapter(adapted(tiny_llama, ATTENTION), tmp_path / "start", base_model="tiny")
    run = dpo_run(tmp_path / "run", tiny_llama, max_steps=1, start_adapter=str(tmp_path / "start"))
    train_here(run)
    assert losses(run)[0] == pytest.approx(math.log(2), abs=1e-5)


def test_every_pair_that_the_run_will_see_is_asked_about_once(tmp_path: Path, tiny_llama: Path) -> None:
    run = dpo_run(tmp_path / "run", tiny_llama, max_steps=2, validation_split=0.25, **FULL)
    recipe = ready(run)
    assert recipe.table is not None
    known = [number for number in range(len(PAIRS)) if recipe.table.knows([number])]
    assert len(known) == 2 * 4 + 3
    written = (run.state / "reference.safetensors").stat().st_mtime_ns
    again = ready(run, resume=True).table
    assert again is not None
    assert torch.equal(again.get(known), recipe.table.get(known))
    assert (run.state / "reference.safetensors").stat().st_mtime_ns == written


def test_pairs_of_several_datasets_that_change_with_the_epoch_are_asked_about_too(
    tmp_path: Path, tiny_llama: Path
) -> None:
    run = dpo_run(tmp_path / "data", tiny_llama, **FULL)
    sets = [{"data_files": [str(run.path / "data.json")], "weight": weight} for weight in (0.5, 2.0)]
    mixed = make_run(tmp_path / "run", tiny_llama, recipe="dpo", epochs=3, data_files=None, datasets=sets, **FULL)
    train_here(mixed)
    assert len(losses(mixed)) == 3 * math.ceil((6 + 24) / 4)
    assert losses(mixed)[-1] < 0.6


def test_a_table_of_other_data_is_not_taken(tmp_path: Path) -> None:
    kept = ReferenceTable()
    kept.put([3, 0], torch.tensor([1.0, 2.0, 3.0, 4.0]))
    kept.put([1], torch.tensor([5.0, 6.0]))
    assert kept.get([0, 3, 1]).tolist() == [2, 1, 5, 4, 3, 6]
    assert not kept.knows([2])
    kept.save(tmp_path / "state" / "table", fingerprint="a")
    assert ReferenceTable.load(tmp_path / "state" / "table", fingerprint="a").get([3]).tolist() == [1, 3]
    assert not ReferenceTable.load(tmp_path / "state" / "table", fingerprint="b").knows([3])
    assert not ReferenceTable.load(tmp_path / "nothing", fingerprint="a").knows([3])

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.support.runs import events, losses, make_run, train_here
from trainer.data.batches import in_batches
from trainer.validation import History, perplexity

FULL: dict[str, Any] = {"recipe": "full", "learning_rate": 1e-3, "validation_split": 0.25}


def test_the_history_keeps_the_lowest_loss_and_how_long_ago_it_was() -> None:
    history = History()
    better = [history.note(step, loss, min_delta=0.0) for step, loss in enumerate([3.0, 2.0, 2.0, 2.5, 1.9], 1)]
    assert better == [True, True, False, False, True]
    assert (history.lowest, history.step, history.since) == (1.9, 5, 0)


def test_a_loss_is_only_lower_by_more_than_the_smallest_difference_that_counts() -> None:
    history = History()
    assert [history.note(step, loss, min_delta=0.5) for step, loss in enumerate([3.0, 2.6, 2.4], 1)] == [
        True,
        False,
        True,
    ]


def test_the_best_checkpoint_is_the_lowest_of_those_that_were_measured() -> None:
    history = History()
    assert [history.note_saved(loss) for loss in (None, 2.0, 3.0, None, 2.0, 1.0)] == [
        False,
        True,
        False,
        False,
        False,
        True,
    ]


def test_a_perplexity_is_always_a_number() -> None:
    assert perplexity(2.0) == math.exp(2)
    assert math.isfinite(perplexity(1e6))


def test_loss_and_accuracy_of_a_validation_are_those_of_the_plain_logits(tmp_path: Path, tiny_llama: Path) -> None:
    run = make_run(tmp_path / "run", tiny_llama, **FULL, epochs=8)
    recipe = train_here(run)
    told = events(run, "validation")[-1]
    (batch,) = in_batches(recipe.data.validation, 4)
    model = recipe.model.eval()
    with torch.no_grad():
        logits = model.logits(model(batch.input_ids, batch.positions)).flatten(0, 1)[batch.target_rows]
    assert told["loss"] == pytest.approx(F.cross_entropy(logits, batch.targets).item(), rel=1e-5)
    right = (logits.argmax(-1) == batch.targets).sum().item()
    assert 0 < right < batch.num_trained
    assert told["token_accuracy"] == pytest.approx(right / batch.num_trained)
    assert told["perplexity"] == pytest.approx(math.exp(told["loss"]))


def test_held_out_records_are_measured_every_so_many_steps_and_at_checkpoints(tmp_path: Path, tiny_llama: Path) -> None:
    options: dict[str, Any] = {"validate_every_n_steps": 2, "save_every_n_steps": 3, "epochs": 3}
    run = make_run(tmp_path / "run", tiny_llama, **FULL, **options)
    train_here(run)
    assert [told["step"] for told in events(run, "validation")] == [2, 3, 4, 6, 8, 9]
    assert [told["step"] for told in events(run, "checkpoint")] == [3, 6, 9]


def test_a_run_that_no_longer_gets_better_ends_with_a_checkpoint(tmp_path: Path, tiny_llama: Path) -> None:
    """At this rate it forgets more than it learns."""
    options: dict[str, Any] = {**FULL, "learning_rate": 0.5, "epochs": 10, "save_every_n_steps": 9}
    run = make_run(tmp_path / "run", tiny_llama, **options, validate_every_n_steps=1, early_stopping_patience=3)
    train_here(run)
    measured = [told["loss"] for told in events(run, "validation")]
    best = measured.index(min(measured)) + 1
    (stopped,) = events(run, "early_stopped")
    assert (stopped["step"], stopped["best_step"]) == (best + 3, best)
    assert len(losses(run)) == best + 3 < 30
    checkpoints = {told["step"]: told for told in events(run, "checkpoint")}
    assert checkpoints[best]["best"]
    assert checkpoints[best + 3]["final"]
    assert (run.checkpoints / f"step_{best}" / "model.safetensors").is_file()


def test_a_run_that_gets_better_is_not_ended(tmp_path: Path, tiny_llama: Path) -> None:
    run = make_run(tmp_path / "run", tiny_llama, **FULL, epochs=2, early_stopping_patience=1)
    train_here(run)
    assert events(run, "early_stopped") == []
    assert len(losses(run)) == 6


def test_prompts_are_answered_at_checkpoints_and_leave_no_trace(tmp_path: Path, tiny_llama: Path) -> None:
    options: dict[str, Any] = {"epochs": 1, "save_every_n_steps": 2, "lora": {"dropout": 0.3}}
    prompts: dict[str, Any] = {"sample_prompts": ["Who?", "What?"], "sample_max_tokens": 3}
    silent = make_run(tmp_path / "silent", tiny_llama, **options)
    asked = make_run(tmp_path / "asked", tiny_llama, **options, **prompts)
    for run in (silent, asked):
        train_here(run)
    told = events(asked, "samples")
    assert [one["step"] for one in told] == [2, 4]
    assert [[sample["prompt"] for sample in one["samples"]] for one in told] == [["Who?", "What?"]] * 2
    assert losses(silent) == losses(asked)

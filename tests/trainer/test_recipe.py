from __future__ import annotations

import csv
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lm.errors import UserError
from tests.support.runs import RECORDS, events, losses, make_run, train_here
from tests.support.tiny import make_tiny_llama
from trainer.data.examples import num_tokens
from trainer.outcome import NonFiniteLoss
from trainer.progress import StepReport

RECIPES = ["full", "lora"]
FULL: dict[str, Any] = {"recipe": "full", "learning_rate": 1e-3}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_model_learns(tmp_path: Path, tiny_llama: Path, recipe: str, dtype: str) -> None:
    run = make_run(tmp_path / "run", tiny_llama, recipe=recipe, dtype=dtype, epochs=8, learning_rate=1e-2)
    train_here(run)
    curve = losses(run)
    assert len(curve) == 32
    assert sum(curve[-4:]) < 0.5 * sum(curve[:4])


def test_bf16_follows_the_fp32_curve(tmp_path: Path, tiny_llama: Path) -> None:
    runs = [make_run(tmp_path / dtype, tiny_llama, dtype=dtype, **FULL) for dtype in ("fp32", "bf16")]
    for run in runs:
        train_here(run)
    assert losses(runs[0]) != losses(runs[1])
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=0.02)


def test_bf16_trains_fp32_masters_and_stores_what_is_frozen_in_bf16(tmp_path: Path, tiny_llama: Path) -> None:
    for recipe in RECIPES:
        run = make_run(tmp_path / recipe, tiny_llama, recipe=recipe, dtype="bf16", max_steps=1)
        trained = train_here(run)
        dtypes = {(p.requires_grad, p.dtype) for p in trained.model.parameters()}
        frozen = {(False, torch.bfloat16)} if recipe == "lora" else set()
        assert dtypes == {(True, torch.float32)} | frozen
        state = [tensor.dtype for values in trained.optimizer.state.values() for tensor in values.values()]
        assert set(state) == {torch.float32}


def test_the_seed_decides_the_whole_run(tmp_path: Path, tiny_llama: Path) -> None:
    options: dict[str, Any] = {"recipe": "lora", "lora": {"dropout": 0.2}, "epochs": 1}
    runs = [make_run(tmp_path / f"{i}", tiny_llama, seed=seed, **options) for i, seed in enumerate((1, 1, 2))]
    for run in runs:
        train_here(run)
    assert losses(runs[0]) == losses(runs[1]) != losses(runs[2])


def test_events_tell_the_run(tmp_path: Path, tiny_llama: Path) -> None:
    run = make_run(tmp_path / "run", tiny_llama, epochs=2, batch_size=4, validation_split=0.25, **FULL)
    train_here(run)
    types = [event["type"] for event in run.read_events()[0]]
    epoch = ["step"] * 3 + ["validation", "checkpoint"]
    assert types == ["dataset", "examples", "started", *epoch, *epoch]
    assert all(event["time"] > 1.7e9 for event in run.read_events()[0])
    (started,) = events(run, "started")
    assert started["device"] == "cpu"
    assert started["dtype"] == "fp32"
    assert (started["total_steps"], started["steps_per_epoch"], started["epochs"]) == (6, 3, 2)
    assert started["parameters"] == started["trainable_parameters"] > 0
    (dataset,) = events(run, "dataset")
    assert (dataset["records"], dataset["validation_records"], dataset["truncated"]) == (12, 4, 0)
    steps = events(run, "step")
    assert [step["step"] for step in steps] == list(range(1, 7))
    assert [step["epoch"] for step in steps] == [1, 1, 1, 2, 2, 2]
    assert {step["total_steps"] for step in steps} == {6}
    assert steps[-1]["trained_tokens"] == 2 * dataset["trained_tokens"]
    assert max(step["learning_rate"] for step in steps) == 1e-3
    assert all(step["grad_norm"] > 0 < step["peak_memory_bytes"] for step in steps)
    assert all(0 < s["trained_tokens_per_second"] < s["processed_tokens_per_second"] for s in steps)
    checkpoints, validations = events(run, "checkpoint"), events(run, "validation")
    assert [(c["step"], c["kind"], c["path"], c["final"]) for c in checkpoints] == [
        (3, "full", "checkpoints/step_3", False),
        (6, "full", "checkpoints/step_6", True),
    ]
    assert [c["validation_loss"] for c in checkpoints] == [v["loss"] for v in validations]
    assert [c["validation_token_accuracy"] for c in checkpoints] == [v["token_accuracy"] for v in validations]
    for name in ("loss", "token_accuracy"):
        assert [c[name] for c in checkpoints] == [steps[2][name], steps[5][name]]
    assert [(c["epoch"], c["best"]) for c in checkpoints] == [(1, True), (2, True)]


def test_metrics_csv_has_the_steps(tmp_path: Path, tiny_llama: Path) -> None:
    run = make_run(tmp_path / "run", tiny_llama, max_steps=3, **FULL)
    train_here(run)
    with run.metrics.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [field.name for field in fields(StepReport)]
    assert [float(row["loss"]) for row in rows] == losses(run)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"epochs": 2}, [4, 8]),
        ({"epochs": 2, "save_every_n_steps": 3}, [3, 6, 8]),
        ({"epochs": 2, "save_every_n_steps": 4}, [4, 8]),
        ({"epochs": 2, "max_steps": 5}, [4, 5]),
        ({"epochs": 2, "max_steps": 4}, [4]),
        ({"epochs": 1, "max_steps": 100}, [4]),
        ({}, [16, 32, 48]),
    ],
)
def test_a_step_is_saved_once(tmp_path: Path, tiny_llama: Path, options: dict[str, Any], steps: list[int]) -> None:
    run = make_run(tmp_path / "run", tiny_llama, **FULL, **options)
    train_here(run)
    assert sorted(int(path.name.removeprefix("step_")) for path in run.checkpoints.iterdir()) == steps
    checkpoints = events(run, "checkpoint")
    assert [checkpoint["step"] for checkpoint in checkpoints] == steps
    assert [checkpoint["final"] for checkpoint in checkpoints] == [False] * (len(steps) - 1) + [True]


def test_lora_publishes_adapters_and_at_the_end_the_merged_model(tmp_path: Path, tiny_llama: Path) -> None:
    run = make_run(tmp_path / "run", tiny_llama, recipe="lora", epochs=2)
    train_here(run)
    assert [(c["kind"], c["path"], c["final"]) for c in events(run, "checkpoint")] == [
        ("adapter", "adapters/step_4", False),
        ("adapter", "adapters/step_8", True),
        ("merged", "checkpoints/step_8", True),
    ]
    assert (run.adapters / "step_4" / "adapter_config.json").is_file()


def test_validation_is_the_loss_of_the_held_out_records_without_dropout(tmp_path: Path, tiny_llama: Path) -> None:
    run = make_run(tmp_path / "run", tiny_llama, validation_split=0.5, max_steps=1, lora={"dropout": 0.9})
    recipe = train_here(run)
    (validation,) = events(run, "validation")
    assert recipe.model.training
    first, second = recipe.validate(), recipe.validate()
    assert first is not None
    assert first == second
    assert {name: validation[name] for name in first.as_event()} == first.as_event()
    assert first.perplexity == pytest.approx(math.exp(first.loss))


def test_gradients_are_clipped(tmp_path: Path, tiny_llama: Path) -> None:
    """AdamW hides the scale of a single step, so its first moment is looked at: a tenth of the clipped gradient."""
    run = make_run(tmp_path / "run", tiny_llama, max_steps=1, max_grad_norm=0.01, **FULL)
    recipe = train_here(run)
    moments = [state["exp_avg"] for state in recipe.optimizer.state.values()]
    assert events(run, "step")[0]["grad_norm"] > 0.01
    assert torch.cat([moment.flatten() for moment in moments]).norm().item() == pytest.approx(0.001, rel=1e-3)


def test_damaged_weights_end_the_run_without_a_checkpoint(tmp_path: Path) -> None:
    model = make_tiny_llama(tmp_path / "model")
    state = load_file(model / "model.safetensors")
    state["model.norm.weight"][0] = math.nan
    save_file(state, model / "model.safetensors", metadata={"format": "pt"})
    run = make_run(tmp_path / "run", model, save_every_n_steps=1, **FULL)
    with pytest.raises(NonFiniteLoss, match=r"step 1: loss nan, .*; lower learning_rate \(now 0\.001\)"):
        train_here(run)
    assert not run.checkpoints.exists()
    assert losses(run) == []


def test_an_unknown_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model folder"):
        train_here(make_run(tmp_path / "run", tmp_path / "none"))


def test_records_longer_than_the_context_of_the_model_are_cut_there(tmp_path: Path, tiny_llama: Path) -> None:
    records = [*RECORDS, {"input": "Who?", "output": "Tuna " * 200}]
    run = make_run(tmp_path / "run", tiny_llama, records=records, max_steps=1, **FULL)
    recipe = train_here(run)
    assert max(map(num_tokens, recipe.data.training)) == 256
    assert events(run, "dataset")[0]["truncated"] == 1

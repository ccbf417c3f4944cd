"""A run that was stopped in its middle ends as one that never was: the same weights and losses, to the bit."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lm.config import load_config
from lm.errors import UserError
from lm.model import build_model
from lm.ops import REFERENCE
from tests.support.runs import RECORDS, begin, events, make_run, table, told_losses, train_here, weights
from tests.support.tiny import make_tiny_llama
from trainer.config import load_run_config
from trainer.optimizer import build_optimizer
from trainer.outcome import Paused
from trainer.progress import Progress
from trainer.recipes import RECIPES
from trainer.run_folder import RunFolder
from trainer.state import read_state, restore

LORA: dict[str, Any] = {"recipe": "lora", "lora": {"rank": 4, "dropout": 0.3}, "learning_rate": 1e-2}
FULL: dict[str, Any] = {"recipe": "full", "learning_rate": 1e-3}
ACCUMULATED: dict[str, Any] = {"batch_size": 2, "gradient_accumulation_steps": 2}
IN_BACKWARD: dict[str, Any] = {"optimizer_in_backward": True, "max_grad_norm": None}
WAYS: dict[str, dict[str, Any]] = {
    "full": {**FULL, **ACCUMULATED, "weight_decay": 0.1},
    "lora": {**LORA, **ACCUMULATED},
    "bf16": {**LORA, **ACCUMULATED, "dtype": "bf16"},
    "adamw_8bit": {**FULL, "optimizer": "adamw_8bit"},
    "sgd": {**FULL, "optimizer": {"name": "sgd", "momentum": 0.9}},
    "adafactor": {**FULL, "optimizer": "adafactor"},
    "in backward": {**FULL, **IN_BACKWARD},
    "packed": {**FULL, "packed": True, "max_seq_len": 128, "batch_size": 1, "epochs": 2},
}


def pausing_at(call: int) -> Callable[[], None]:
    """What the recipe asks between its batches: the pause comes at the `call`-th time."""
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise Paused

    return check


def pause(run: RunFolder, call: int, *, resume: bool = False) -> None:
    with pytest.raises(Paused):
        train_here(run, resume=resume, check=pausing_at(call))


def assert_same(run: RunFolder, whole: RunFolder) -> None:
    assert told_losses(run) == told_losses(whole)
    assert weights(run) == weights(whole)
    for name in ("step", "epoch", "loss", "token_accuracy", "learning_rate", "grad_norm", "trained_tokens"):
        assert [row[name] for row in table(run)] == [row[name] for row in table(whole)], name
    for kind in ("validation", "checkpoint"):
        first, second = ({told["step"]: {**told, "time": 0} for told in events(one, kind)} for one in (run, whole))
        assert first == second


@pytest.mark.parametrize("way", WAYS)
def test_a_paused_run_goes_on_to_the_same_bits(tmp_path: Path, tiny_llama: Path, way: str) -> None:
    """Paused twice, where steps have two batches once in the middle of one."""
    options = {"epochs": 3, "save_every_n_steps": 5, **WAYS[way]}
    whole, run = (make_run(tmp_path / name, tiny_llama, **options) for name in ("whole", "run"))
    train_here(whole)
    pause(run, 6)
    pause(run, 5, resume=True)
    train_here(run, resume=True)
    assert len(events(run, "resumed")) == 2
    assert 0 < events(run, "resumed")[0]["step"] < events(run, "resumed")[1]["step"]
    assert_same(run, whole)


def test_an_unfinished_step_is_thrown_away_with_the_random_numbers_that_it_drew(
    tmp_path: Path, tiny_llama: Path
) -> None:
    """Its dropout drew some; without them the second try of the step would draw others."""
    options = {**WAYS["lora"], "epochs": 1}
    whole, run = (make_run(tmp_path / name, tiny_llama, **options) for name in ("whole", "run"))
    train_here(whole)
    pause(run, 4)
    assert [path.name for path in run.state.glob("step_*")] == ["step_1"]
    train_here(run, resume=True)
    assert [step["step"] for step in events(run, "step")] == [1, 2, 3, 4]
    assert_same(run, whole)


def test_a_pause_within_a_validation_does_it_again(tmp_path: Path, tiny_llama: Path) -> None:
    options = {**FULL, "epochs": 2, "validation_split": 0.5, "early_stopping_patience": 1, "sample_prompts": ["Who?"]}
    whole, run = (make_run(tmp_path / name, tiny_llama, **options) for name in ("whole", "run"))
    train_here(whole)
    pause(run, 2 + 2)  # two steps of a batch; then two batches that are held out
    assert events(run, "validation") == []
    assert [path.name for path in run.state.glob("step_*")] == ["step_2"]
    train_here(run, resume=True)
    assert len(events(run, "validation")) == 2
    assert [told["samples"] for told in events(run, "samples")] == [
        told["samples"] for told in events(whole, "samples")
    ]
    assert_same(run, whole)


def test_what_was_published_before_the_state_is_left_and_told_again(tmp_path: Path, tiny_llama: Path) -> None:
    """As after a kill between the two: the checkpoint may be served already."""
    options = {**FULL, "epochs": 2, "save_every_n_steps": 3}
    whole, run = (make_run(tmp_path / name, tiny_llama, **options) for name in ("whole", "run"))
    train_here(whole)
    pause(run, 6)
    shutil.rmtree(run.state / "step_5")
    first = (run.checkpoints / "step_3").stat().st_ino
    train_here(run, resume=True)
    assert [event["step"] for event in events(run, "resumed")] == [0]
    assert [told["step"] for told in events(run, "checkpoint")] == [3, 3, 6, 8]
    assert (run.checkpoints / "step_3").stat().st_ino == first
    assert_same(run, whole)


def test_only_the_newest_state_is_kept(tmp_path: Path, tiny_llama: Path) -> None:
    run = make_run(tmp_path / "run", tiny_llama, **FULL, epochs=2, save_every_n_steps=2)
    pause(run, 8)
    assert [path.name for path in run.state.glob("step_*")] == ["step_7"]
    (state,) = run.state.glob("step_*")
    assert {path.suffix for path in state.iterdir()} == {".safetensors", ".json"}


def test_a_run_that_was_paused_before_its_first_step_begins_anew(tmp_path: Path, tiny_llama: Path) -> None:
    whole, run = (make_run(tmp_path / name, tiny_llama, **LORA, epochs=1) for name in ("whole", "run"))
    train_here(whole)
    pause(run, 1)
    assert run.newest_state() is None
    train_here(run, resume=True)
    assert_same(run, whole)


def test_a_pause_before_a_resumed_run_trains_knows_how_far_it_is(tmp_path: Path, tiny_llama: Path) -> None:
    run = make_run(tmp_path / "run", tiny_llama, **FULL, epochs=1)
    pause(run, 3)
    with Progress(run) as progress:
        recipe = RECIPES["full"](load_run_config(run.config), run, progress, pausing_at(1))
        with pytest.raises(Paused):
            recipe.setup(resume=True)
    assert recipe.position.step == 2


@pytest.mark.parametrize(("name", "value"), [("batch_size", 2), ("learning_rate", 0.5), ("seed", 7)])
def test_an_option_that_the_state_depends_on_cannot_change(
    tmp_path: Path, tiny_llama: Path, name: str, value: float
) -> None:
    run = make_run(tmp_path / "run", tiny_llama, **FULL, epochs=1)
    pause(run, 2)
    change(run, name, value)
    with pytest.raises(UserError, match=f"{name}: the run was begun with .* and cannot go on with {value}") as caught:
        train_here(run, resume=True)
    assert caught.value.param == name


def test_a_run_can_go_on_to_more_epochs_and_from_another_folder(tmp_path: Path, tiny_llama: Path) -> None:
    run = make_run(tmp_path / "run", tiny_llama, **FULL, epochs=1)
    pause(run, 3)
    change(run, "epochs", 2)
    run.path.rename(tmp_path / "moved")
    moved = RunFolder(tmp_path / "moved")
    change(moved, "data_files", [str(moved.path / "data.json")])
    train_here(moved, resume=True)
    assert sorted(told_losses(moved)) == list(range(1, 9))


@pytest.mark.parametrize("max_steps", [1, 3])
def test_a_run_that_would_have_ended_already_is_refused(tmp_path: Path, tiny_llama: Path, max_steps: int) -> None:
    """It would publish nothing, and be called a success."""
    run = make_run(tmp_path / "run", tiny_llama, **FULL, epochs=1)
    pause(run, 4)
    change(run, "max_steps", max_steps)
    with pytest.raises(UserError, match=f"max_steps: the run is behind step 3, and shall end with step {max_steps}"):
        train_here(run, resume=True)
    change(run, "max_steps", 4)
    train_here(run, resume=True)
    assert (run.checkpoints / "step_4").is_dir()


def test_other_data_is_refused(tmp_path: Path, tiny_llama: Path) -> None:
    run = make_run(tmp_path / "run", tiny_llama, **FULL, epochs=1)
    pause(run, 2)
    (run.path / "data.json").write_text(json.dumps(RECORDS[1:]))
    with pytest.raises(UserError, match="the data is not what the run was begun with"):
        train_here(run, resume=True)


def test_a_state_of_another_model_is_refused(tmp_path: Path, tiny_llama: Path) -> None:
    run = make_run(tmp_path / "run", tiny_llama, **FULL, epochs=1)
    pause(run, 2)
    state = read_state(run, load_run_config(run.config))
    assert state is not None
    smaller, other = (
        make_tiny_llama(tmp_path / "smaller", num_hidden_layers=1),
        make_run(tmp_path / "other", tiny_llama),
    )
    change(other, "model", str(smaller))
    for folder, missing in ((make_run(tmp_path / "third", smaller, **FULL), "layers.1"), (other, "embed_tokens")):
        with Progress(folder) as progress:
            recipe = begin(folder, progress)
        with pytest.raises(UserError, match=f"step_1 does not fit the model: model.{missing}.* and None here"):
            restore(state, recipe.model, recipe.optimizer, recipe.device)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "sgd", "adafactor"])
def test_what_an_optimizer_keeps_goes_to_the_device_of_its_weights(tmp_path: Path, tiny_llama: Path, name: str) -> None:
    """A run may go on on another device than it was begun on, here on one that computes nothing."""
    run = make_run(tmp_path / "run", tiny_llama, **FULL, optimizer={"name": name, "momentum": 0.9}, epochs=1)
    pause(run, 2)
    config = load_run_config(run.config)
    state = read_state(run, config)
    assert state is not None
    model = build_model(load_config(tiny_llama), device=torch.device("meta"), dtype=torch.float32, ops=REFERENCE)
    optimizer = build_optimizer(list(model.parameters()), config.optimizer, weight_decay=0.0)
    restore(state, model, optimizer, torch.device("cpu"))
    kept = [(key, value.device.type) for one in optimizer.state.values() for key, value in one.items()]
    assert set(kept) - {("step", "cpu")} == {(key, "meta") for key, _ in kept if key != "step"} != set()


def test_a_disk_that_fills_while_a_state_is_written_leaves_the_one_before(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", tiny_llama, **FULL, epochs=1)
    pause(run, 2)

    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("trainer.state.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        train_here(run, resume=True, check=pausing_at(2))
    assert [path.name for path in run.state.iterdir() if path.name != "data"] == ["step_1"]


def change(run: RunFolder, name: str, value: object) -> None:
    config = yaml.safe_load(run.config.read_text(encoding="utf-8"))
    run.config.write_text(yaml.safe_dump({**config, name: value}), encoding="utf-8")

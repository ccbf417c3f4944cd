"""What people and programs see of whole runs: samples, trackers, and what checkpoints say of themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import begin, events, losses, make_run, train_here, weights
from trainer.card import read_facts
from trainer.config import load_run_config
from trainer.outcome import Paused
from trainer.progress import Progress
from trainer.run_folder import RunFolder
from trainer.tracking import start_trackers

OPTIONS: dict[str, Any] = {"recipe": "lora", "lora": {"rank": 4, "dropout": 0.3}, "learning_rate": 1e-2, "epochs": 2}
SAMPLES: dict[str, Any] = {"sample_prompts": ["Question 3: who are you", "Hi"], "sample_max_tokens": 6}


def texts_of_checkpoints(run: RunFolder) -> dict[str, bytes]:
    paths = [path for name in ("README.md", "tuneserve.json") for path in sorted(run.path.rglob(name))]
    return {str(path.relative_to(run.path)): path.read_bytes() for path in paths}


def test_samples_are_told_at_each_checkpoint_and_change_neither_losses_nor_weights(
    tmp_path: Path, tiny_llama: Path
) -> None:
    plain = make_run(tmp_path / "plain", tiny_llama, **OPTIONS)
    asked = make_run(tmp_path / "asked", tiny_llama, **OPTIONS, **SAMPLES)
    train_here(plain)
    train_here(asked)
    told = events(asked, "samples")
    assert [event["step"] for event in told] == sorted({event["step"] for event in events(asked, "checkpoint")})
    assert [sample["prompt"] for sample in told[0]["samples"]] == SAMPLES["sample_prompts"]
    assert told[0]["samples"] != told[-1]["samples"]
    assert losses(asked) == losses(plain)
    assert weights(asked) == weights(plain)
    assert events(plain, "samples") == []


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("recipe", ["full", "lora"])
def test_samples_are_told_in_each_precision(tmp_path: Path, tiny_llama: Path, recipe: str, dtype: str) -> None:
    run = make_run(tmp_path / "run", tiny_llama, **SAMPLES, recipe=recipe, dtype=dtype, max_steps=1)
    train_here(run)
    assert len(events(run, "samples")) == 1


def test_checkpoints_of_a_resumed_run_say_what_those_of_an_uninterrupted_one_say(
    tmp_path: Path, tiny_llama: Path
) -> None:
    whole, run = (make_run(tmp_path / name / "run", tiny_llama, **OPTIONS, save_every_n_steps=3) for name in "ab")
    train_here(whole)
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise Paused

    with pytest.raises(Paused):
        train_here(run, check=check)
    train_here(run, resume=True)
    assert texts_of_checkpoints(run) == texts_of_checkpoints(whole)
    assert len(texts_of_checkpoints(run)) == 2 * len(events(whole, "checkpoint"))


def test_what_a_checkpoint_says_is_what_the_events_say(tmp_path: Path, tiny_llama: Path) -> None:
    run = make_run(tmp_path / "run-9", tiny_llama, **OPTIONS, validation_split=0.25, seed=3)
    train_here(run)
    [dataset] = events(run, "dataset")
    for event in events(run, "checkpoint"):
        told = read_facts(run.path / event["path"])
        assert told is not None
        assert (told["job"], told["kind"], told["step"], told["seed"]) == ("run-9", event["kind"], event["step"], 3)
        assert (told["epoch"], told["final"]) == (event["epoch"], event["final"])
        for name in ("loss", "token_accuracy", "validation_loss", "validation_token_accuracy"):
            assert told["losses"][name] == event[name]
        for name in ("fingerprint", "records", "tokens", "trained_tokens", "validation_records"):
            assert told["dataset"][name] == dataset[name]


def test_trackers_change_nothing(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    tracking = {"wandb": {"project": "p"}, "mlflow": {"experiment": "e"}}
    plain = make_run(tmp_path / "plain", tiny_llama, **OPTIONS)
    tracked = make_run(tmp_path / "tracked", tiny_llama, **OPTIONS, tracking=tracking)
    train_here(plain)
    with Progress(tracked) as progress:
        progress.attach(start_trackers(load_run_config(tracked.config), tracked))
        begin(tracked, progress).train()
    assert [event["message"] for event in events(tracked, "warning") if "tracking" in event["message"]] == []
    assert losses(tracked) == losses(plain)
    assert weights(tracked) == weights(plain)

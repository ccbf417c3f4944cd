"""A trainer that is killed at random points, again and again, ends as one that never was: to the bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.proof_size import proof_size
from tests.support.runs import events, make_run, table, told_losses, weights
from tests.support.tiny import make_tiny_llama
from trainer.run_folder import RunFolder, RunResult

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

NUM_KILLS = proof_size(10, in_ci=4)
"""Of each recipe."""
WAYS: dict[str, dict[str, Any]] = {
    "full": {"recipe": "full", "learning_rate": 1e-4, "validation_split": 0.25, "validate_every_n_steps": 7},
    "lora": {"recipe": "lora", "lora": {"rank": 4, "dropout": 0.2}, "learning_rate": 1e-3},
}
OPTIONS: dict[str, Any] = {
    "batch_size": 2,
    "gradient_accumulation_steps": 2,
    "epochs": 120,
    "save_every_n_steps": 10,
    "sample_prompts": ["Who are you?"],
    "sample_max_tokens": 4,
}

Moment = Callable[[RunFolder], bool]


@contextmanager
def trainer(run: RunFolder, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    with run.log.open("ab") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "trainer", str(run.path), *options]
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def after_steps(count: int) -> Moment:
    """Once so many more steps have been told."""
    seen = 0
    offset: int | None = None

    def has_come(run: RunFolder) -> bool:
        nonlocal seen, offset
        if offset is None:
            _, offset = run.read_events()
        told, offset = run.read_events(offset)
        seen += sum(event["type"] == "step" for event in told)
        return bool(seen >= count)

    return has_come


def while_writing(kind: str) -> Moment:
    """While a state, or a checkpoint, is half on the disk, and not what the last kill left there."""
    has_trained = after_steps(1)

    def has_come(run: RunFolder) -> bool:
        roots = (run.state,) if kind == "state" else (run.adapters, run.checkpoints)
        return has_trained(run) and any(next(root.glob(".step_*.tmp"), None) for root in roots)

    return has_come


def kill_at(run: RunFolder, has_come: Moment, *options: str) -> None:
    has_come(run)
    with trainer(run, *options) as process:
        deadline = time.monotonic() + 300
        while not has_come(run):
            assert process.poll() is None, run.log_tail()
            assert time.monotonic() < deadline, run.log_tail()
        process.kill()
        assert process.wait() == -signal.SIGKILL


def moments(seed: int) -> list[Moment]:
    """Some while something is written, the others after a random number of steps; the first before any state."""
    draw = random.Random(seed)
    written = dict(zip(draw.sample(range(1, NUM_KILLS), 3), ("state", "checkpoint", "state"), strict=True))
    return [
        while_writing(written[number]) if number in written else after_steps(draw.randint(1, 40 if number else 5))
        for number in range(NUM_KILLS)
    ]


@pytest.mark.parametrize("way", WAYS)
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_was_not(
    way: str, tmp_path: Path, figure: Callable[[str, object], None]
) -> None:
    model = make_tiny_llama(tmp_path / "model")
    whole, run = (make_run(tmp_path / name, model, **OPTIONS, **WAYS[way]) for name in ("whole", "run"))
    with trainer(whole) as process:
        assert process.wait(timeout=600) == 0, whole.log_tail()
    for number, moment in enumerate(moments(seed=list(WAYS).index(way))):
        kill_at(run, moment, *(["--resume"] if number else []))
        assert run.read_result() is None
    with trainer(run, "--resume") as process:
        assert process.wait(timeout=600) == 0, run.log_tail()
    assert run.read_result() == RunResult(status="succeeded")
    resumed = [event["step"] for event in events(run, "resumed")]
    assert len(resumed) == NUM_KILLS
    assert told_losses(run) == told_losses(whole)
    assert list(told_losses(whole)) == list(range(1, len(told_losses(whole)) + 1))
    assert weights(run) == weights(whole)
    for name in ("step", "loss", "token_accuracy", "learning_rate", "grad_norm", "trained_tokens"):
        assert [row[name] for row in table(run)] == [row[name] for row in table(whole)]
    last = [{event["step"]: {**event, "time": 0} for event in events(one, "samples")} for one in (run, whole)]
    assert last[0] == last[1]
    files = len(weights(whole))
    told = f"{NUM_KILLS} SIGKILLs, resumed behind steps {resumed}: {len(told_losses(run))} losses, {files} files equal"
    figure(f"resumed = uninterrupted, {way}", told)

"""`python -m trainer` as a real process, in every way it can end."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.support.runs import events, make_run, told_losses, train_here, weights
from tests.support.tiny import make_tiny_llama
from trainer.run_folder import RunFolder, RunResult

COMMAND = [sys.executable, "-m", "trainer"]
LONG: dict[str, Any] = {"recipe": "full", "epochs": 1000, "save_every_n_steps": 100_000}


@contextmanager
def trainer(run: RunFolder, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """The trainer in the run folder, its output in the log; killed at the end if it still lives."""
    with run.log.open("ab") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen([*COMMAND, str(run.path), *options], stdout=log, stderr=log, env=environment)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def finish(run: RunFolder, *options: str) -> int:
    with trainer(run, *options) as process:
        return process.wait(timeout=120)


def failure(run: RunFolder) -> RunResult:
    """Run it; it must fail with exit code 1 and a result."""
    assert finish(run) == 1
    result = run.read_result()
    assert result is not None
    assert result.status == "failed"
    assert not run.is_locked()
    return result


def wait_for_steps(run: RunFolder, count: int) -> None:
    deadline = time.monotonic() + 120
    while len(events(run, "step")) < count:
        assert time.monotonic() < deadline, run.log_tail()
        time.sleep(0.02)


@pytest.mark.parametrize("recipe", ["full", "lora"])
def test_a_run_that_succeeds(tmp_path: Path, tiny_llama: Path, recipe: str) -> None:
    run = make_run(tmp_path / "run", tiny_llama, recipe=recipe, epochs=2)
    assert finish(run) == 0
    assert run.read_result() == RunResult(status="succeeded")
    assert (run.checkpoints / "step_8" / "model.safetensors").is_file()
    text = run.log.read_text()
    for line in (
        "Tokenizer is initialized from file.",
        "Model is initialized with precision torch.float32.",
        "Memory stats after model init:\n\tCPU peak memory allocation: 0.",
        "Optimizer is initialized.",
        "Loss is initialized.",
        "Model checkpoint of size 0.00 GB saved to ",
        f"2|8|Loss: {events(run, 'step')[-1]['loss']:.5f}: 100%|",
        "succeeded",
    ):
        assert line in text, line
    assert "Traceback" not in text


def test_log_lines_stand_apart_from_the_progress_bar(tmp_path: Path, tiny_llama: Path) -> None:
    run = make_run(tmp_path / "run", tiny_llama, recipe="full", epochs=1, save_every_n_steps=2)
    assert finish(run) == 0
    drawn = [state for line in run.log.read_text().split("\n") for state in line.split("\r")]
    saved = [state for state in drawn if "Model checkpoint of size" in state]
    assert len(saved) == 2
    assert all("Loss:" not in state for state in saved)
    assert sum("Model checkpoint of size" in line for line in run.log_tail().split("\n")) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_cancels_within_one_step(tmp_path: Path, tiny_llama: Path, number: signal.Signals) -> None:
    run = make_run(tmp_path / "run", tiny_llama, **LONG)
    with trainer(run) as process:
        wait_for_steps(run, 3)
        process.send_signal(number)
        seen = len(events(run, "step"))
        assert process.wait(timeout=60) == 0
    assert run.read_result() == RunResult(status="cancelled")
    assert len(events(run, "step")) <= seen + 1
    assert not run.checkpoints.exists()
    assert not run.is_locked()


def test_a_killed_run_leaves_no_result_and_no_lock(tmp_path: Path, tiny_llama: Path) -> None:
    run = make_run(tmp_path / "run", tiny_llama, **LONG)
    with trainer(run) as process:
        wait_for_steps(run, 3)
        assert run.is_locked()
        process.kill()
        assert process.wait(timeout=60) == -signal.SIGKILL
    assert run.read_result() is None
    assert not run.is_locked()
    assert re.search(r"\d+\|\d+\|Loss: \d+\.\d{5}", run.log_tail())


def test_a_paused_run_goes_on_to_the_end_of_one_that_was_not(tmp_path: Path, tiny_llama: Path) -> None:
    """Paused while it trains, then killed behind a checkpoint, then let alone."""
    options: dict[str, Any] = {"lora": {"dropout": 0.2}, "epochs": 40, "save_every_n_steps": 50}
    whole, run = (make_run(tmp_path / name, tiny_llama, **options) for name in ("whole", "run"))
    train_here(whole)
    with trainer(run) as process:
        wait_for_steps(run, 3)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(timeout=60) == 0
    assert run.read_result() == RunResult(status="paused")
    (paused,) = events(run, "paused")
    assert 3 <= paused["step"] < 160
    with trainer(run, "--resume") as process:
        wait_for_steps(run, paused["step"] + 55)
        process.kill()
    assert run.read_result() is None
    assert finish(run, "--resume") == 0
    assert run.read_result() == RunResult(status="succeeded")
    first, second = events(run, "resumed")
    assert first["step"] == paused["step"]
    assert second["step"] >= 50
    assert told_losses(run) == told_losses(whole)
    assert weights(run) == weights(whole)
    assert not run.state.exists()


def test_a_run_that_succeeded_does_not_go_on(tmp_path: Path, tiny_llama: Path) -> None:
    run = make_run(tmp_path / "run", tiny_llama)
    run.write_result(RunResult(status="succeeded"))
    assert finish(run, "--resume") == 2
    assert "has succeeded" in run.log_tail()
    assert run.read_result() == RunResult(status="succeeded")


def test_a_cancel_goes_before_a_pause() -> None:
    code = "import os, signal; from trainer.__main__ import StopRequest; stop = StopRequest(); " + "; ".join(
        f"os.kill(os.getpid(), signal.{name})" for name in ("SIGUSR1", "SIGTERM")
    )
    child = subprocess.run([sys.executable, "-c", f"{code}; stop.check()"], capture_output=True, text=True, check=False)
    assert "trainer.outcome.Cancelled: SIGTERM, SIGUSR1" in child.stderr


def test_damaged_weights_are_a_non_finite_loss(tmp_path: Path) -> None:
    model = make_tiny_llama(tmp_path / "model")
    state = load_file(model / "model.safetensors")
    state["model.norm.weight"][0] = math.nan
    save_file(state, model / "model.safetensors", metadata={"format": "pt"})
    run = make_run(tmp_path / "run", model, save_every_n_steps=1)
    result = failure(run)
    assert result.error_code == "non_finite_loss"
    assert "step 1: loss nan" in str(result.error_message)
    assert not run.checkpoints.exists()
    assert not run.adapters.exists()
    assert "Traceback" not in run.log.read_text()


def test_a_config_that_is_wrong_is_named(tmp_path: Path, tiny_llama: Path) -> None:
    result = failure(make_run(tmp_path / "run", tiny_llama, learning_rate=-1.0))
    assert (result.error_code, result.error_param) == ("invalid_config", "learning_rate")
    assert "-1.0" in str(result.error_message)
    broken = make_run(tmp_path / "broken", tiny_llama)
    broken.config.write_text("model: [")
    assert failure(broken).error_code == "invalid_config"


def test_a_model_that_is_not_there_is_a_wrong_config(tmp_path: Path) -> None:
    result = failure(make_run(tmp_path / "run", tmp_path / "none"))
    assert result.error_code == "invalid_config"
    assert "no model folder" in str(result.error_message)


def test_data_that_is_wrong_is_named_with_its_record(tmp_path: Path, tiny_llama: Path) -> None:
    run = make_run(tmp_path / "run", tiny_llama, records=[{"input": "a", "output": "b"}, {"input": "a"}])
    result = failure(run)
    assert result.error_code == "invalid_training_file"
    assert "data.json, record 2 (line 1)" in str(result.error_message)
    assert str(result.error_message) in run.log_tail()


def test_an_unexpected_error_leaves_its_traceback_in_the_log(tmp_path: Path, tiny_llama: Path) -> None:
    run = make_run(tmp_path / "run", tiny_llama, max_steps=1)
    run.adapters.write_text("not a folder")
    result = failure(run)
    assert result.error_code == "internal_error"
    assert str(result.error_message).startswith("FileExistsError: ")
    assert "Traceback" in run.log.read_text()


def test_nothing_is_touched_where_another_trainer_works(tmp_path: Path, tiny_llama: Path) -> None:
    run = make_run(tmp_path / "run", tiny_llama)
    with run.locked():
        assert finish(run) == 2
    assert "another trainer is at work" in run.log_tail()
    assert not run.events.exists()
    assert run.read_result() is None


@pytest.mark.parametrize("leftover", ["events.jsonl", "result.json"])
def test_a_run_folder_is_used_once(tmp_path: Path, tiny_llama: Path, leftover: str) -> None:
    run = make_run(tmp_path / "run", tiny_llama)
    old = json.dumps({"status": "succeeded"})
    (run.path / leftover).write_text(old)
    assert finish(run) == 2
    assert "was run before" in run.log_tail()
    assert (run.path / leftover).read_text() == old


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    assert finish(RunFolder(tmp_path)) == 2
    assert f"there is no {tmp_path}/config.yaml" in RunFolder(tmp_path).log_tail()


def test_torch_loads_no_vendor_backend_by_itself(tmp_path: Path, tiny_llama: Path) -> None:
    """A broken torch_npu would break `import torch` where it is loaded by torch's entry point."""
    plugin = tmp_path / "plugin"
    info = plugin / "broken_backend-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-backend\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[torch.backends]\nbroken = broken_backend:load\n")
    (plugin / "broken_backend.py").write_text("raise RuntimeError('loaded')\n")
    environment = {**os.environ, "PYTHONPATH": f"{plugin}:{Path.cwd()}", "OMP_NUM_THREADS": "1"}
    environment.pop("TORCH_DEVICE_BACKEND_AUTOLOAD", None)
    probe = subprocess.run([sys.executable, "-c", "import torch"], env=environment, capture_output=True, check=False)
    assert b"loaded" in probe.stderr
    run = make_run(tmp_path / "run", tiny_llama, max_steps=1)
    subprocess.run([*COMMAND, str(run.path)], env=environment, capture_output=True, check=True)

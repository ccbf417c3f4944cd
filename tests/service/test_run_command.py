"""`tuneserve run` in processes: several data sets, older checkpoints removed, and a run that goes on after SIGKILL."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from lm.errors import UserError
from service.jobs.trainer_process import trainer_environment
from service.run_command import remove_older, run_to_go_on_with
from service.run_config import PlannedRun, plan_run
from tests.support.runs import RECORDS, make_run
from tests.support.tiny import make_tiny_model
from trainer.run_folder import RunFolder, RunResult

RECIPE = "lora_finetune_single_device"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration of our own with two data sets, in a home of its own."""
    monkeypatch.setenv("TUNESERVE_HOME", str(tmp_path / "home"))
    model = make_tiny_model(tmp_path / "home" / "models" / "tiny", "llama")
    for name in ("a", "b"):
        (tmp_path / f"{name}.json").write_text(json.dumps(RECORDS))
    said = {
        "model": str(model),
        "datasets": [
            {"data_files": [str(tmp_path / "a.json")]},
            {"data_files": [str(tmp_path / "b.json")], "weight": 0.5},
        ],
        "device": "cpu",
        "dtype": "fp32",
        "epochs": 3,
        "batch_size": 2,
        "save_every_n_steps": 6,
        "keep_last_n_checkpoints": 1,
        "output_dir": str(tmp_path / "out"),
    }
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(said))
    return path


def started(config: Path, *words: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "service.cli", "run", RECIPE, "--config", str(config), *words]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=trainer_environment() | {"OMP_NUM_THREADS": "1"}
    )


def steps(run: RunFolder) -> list[int]:
    return [event["step"] for event in run.read_events()[0] if event["type"] == "step"]


def test_a_killed_run_goes_on_in_its_folder_and_keeps_its_newest_checkpoint(config: Path, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "out")
    with started(config) as killed:
        while len(steps(run)) < 8:
            assert killed.poll() is None
            time.sleep(0.02)
        pid = next(event["pid"] for event in run.read_events()[0] if event["type"] == "started")
        os.kill(pid, signal.SIGKILL)
        killed.communicate()
    assert run.read_result() is None
    with started(config, "resume_from_checkpoint=true") as resumed:
        told, _ = resumed.communicate(timeout=120)
    assert resumed.returncode == 0
    assert steps(run)[-1] == 36  # 16 records, and half of 16, in batches of 2, three times
    assert any(event["type"] == "resumed" for event in run.read_events()[0])
    assert [path.name for path in run.adapters.iterdir()] == ["step_36"]
    assert told.decode().split()[-1] == str(run.path / "checkpoints" / "step_36")
    with started(config, "resume_from_checkpoint=true") as over:
        over.communicate(timeout=60)
    assert over.returncode == 2


def test_a_config_that_shall_go_on_names_where(config: Path, tmp_path: Path) -> None:
    planned = plan_run(RECIPE, str(config), ["resume_from_checkpoint=true"])
    assert planned.resume
    with pytest.raises(UserError, match="no run that could go on"):
        run_to_go_on_with(planned)
    with pytest.raises(UserError, match="true or false"):
        plan_run(RECIPE, str(config), ["resume_from_checkpoint=3"])
    nowhere = plan_run(RECIPE, str(config), ["resume_from_checkpoint=true", "~output_dir"])
    with pytest.raises(UserError, match="output_dir must name"):
        run_to_go_on_with(nowhere)


def test_the_newest_run_that_is_not_over_goes_on(config: Path, tmp_path: Path) -> None:
    planned: PlannedRun = plan_run(RECIPE, str(config), ["resume_from_checkpoint=true"])
    for name, age in (("old", 20), ("newer", 10), ("over", 0)):
        run = make_run(tmp_path / "out" / name, tmp_path)
        run.events.write_text("")
        os.utime(run.events, (time.time() - age,) * 2)
    RunFolder(tmp_path / "out" / "over").write_result(RunResult(status="succeeded"))
    assert run_to_go_on_with(planned) == tmp_path / "out" / "newer"


def test_the_best_checkpoint_stays_beside_the_newest(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", tmp_path)
    lines = []
    for step in (1, 2, 3, 4):
        (run.adapters / f"step_{step}").mkdir(parents=True)
        lines.append({"type": "checkpoint", "step": step, "path": f"adapters/step_{step}", "best": step == 2})
    run.events.write_text("".join(json.dumps(line) + "\n" for line in lines))
    remove_older(run, None)
    assert len([*run.adapters.iterdir()]) == 4
    remove_older(run, 1)
    assert {path.name for path in run.adapters.iterdir()} == {"step_2", "step_4"}

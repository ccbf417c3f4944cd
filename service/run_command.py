"""`tuneserve run`: one fine-tuning run in the foreground, without a service. Torch-free: the trainer is a child process."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import yaml

from lm.errors import UserError
from lm.folder import user_path
from service.jobs.trainer_process import TRAINER, trainer_environment
from service.run_config import PlannedRun, plan_run, print_notes
from service.settings import load_settings
from trainer.run_folder import RunFolder


def run_recipe(recipe: str, config: str, words: Sequence[str]) -> int:
    """Train as the YAML file `config` says, in the folder `output_dir` that it or `words` (key=value, ~key) name.

    By default that is a new folder in `runs` of the home; with `resume_from_checkpoint` it is the newest run in
    output_dir, which goes on. The terminal and the run's log.txt show the same bytes. Ctrl-C and SIGTERM cancel the run
    within a step, a second one kills it. Returns the trainer's exit code: 0 also for a cancelled run. Raises UserError
    before anything is written.
    """
    planned = plan_run(recipe, config, words)
    run = RunFolder(run_to_go_on_with(planned) if planned.resume else run_folder_of(planned))
    print_notes(planned.notes)
    run.path.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(planned.config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    run.config.write_text(text, encoding="utf-8")
    print(f"run folder: {run.path}", file=sys.stderr, flush=True)
    exit_code = _train(run, resume=planned.resume, keep=planned.config.keep_last_n_checkpoints)
    final = [event["path"] for event in run.read_events()[0] if event["type"] == "checkpoint" and event["final"]]
    for path in dict.fromkeys(final):
        print(run.path / path)
    return exit_code


def run_folder_of(planned: PlannedRun) -> Path:
    """Where the run goes. torchtune's users keep the model in output_dir, and name the same one again for the next run:
    where something is, the run gets a folder of its own inside.
    """
    new = f"{planned.config.recipe}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    if planned.output_dir is None:
        return load_settings(None, {}, os.environ).runs_dir / new
    folder = user_path(planned.output_dir).resolve()
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return folder
    if planned.is_torchtune and folder.is_dir():
        print(f"note: output_dir: {folder} is not empty; the run goes into {new} in it", file=sys.stderr, flush=True)
        return folder / new
    raise UserError(f"output_dir: {folder} is not an empty folder; name a new one", param="output_dir")


def run_to_go_on_with(planned: PlannedRun) -> Path:
    """The newest run in output_dir, or that folder itself, which has not come to its end. Raises UserError."""
    if planned.output_dir is None:
        raise UserError("resume_from_checkpoint: output_dir must name the folder of the run", param="output_dir")
    folder = user_path(planned.output_dir).resolve()
    runs = [RunFolder(path.parent) for path in (*folder.glob("config.yaml"), *folder.glob("*/config.yaml"))]
    runs = [run for run in runs if run.events.exists() and not _has_succeeded(run)]
    if not runs:
        message = f"resume_from_checkpoint: in {folder} is no run that could go on; write False to begin a new one"
        raise UserError(message, param="resume_from_checkpoint")
    return max(runs, key=lambda run: run.events.stat().st_mtime).path


def _has_succeeded(run: RunFolder) -> bool:
    result = run.read_result()
    return result is not None and result.status == "succeeded"


def _train(run: RunFolder, *, resume: bool, keep: int | None) -> int:
    trainer = subprocess.Popen(
        [*TRAINER, str(run.path), *(["--resume"] if resume else [])],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=trainer_environment(),
        start_new_session=True,  # the terminal's Ctrl-C comes to us alone
    )
    with trainer, _signals_cancel(trainer), run.log.open("ab") as log:
        assert trainer.stdout is not None
        while data := os.read(trainer.stdout.fileno(), 1 << 16):
            log.write(data)
            log.flush()
            sys.stderr.buffer.write(data)
            sys.stderr.flush()
            remove_older(run, keep)
    return trainer.returncode if trainer.returncode >= 0 else 128 - trainer.returncode


def remove_older(run: RunFolder, keep: int | None) -> None:
    """Remove all checkpoints but the newest `keep` steps and the best one. None keeps all."""
    if keep is None:
        return
    told = [event for event in run.read_events()[0] if event["type"] == "checkpoint"]
    steps = sorted({event["step"] for event in told})
    kept = {*steps[-keep:], *[event["step"] for event in told if event.get("best")][-1:]}
    for event in told:
        if event["step"] not in kept:
            shutil.rmtree(run.path / event["path"], ignore_errors=True)


@contextmanager
def _signals_cancel(trainer: subprocess.Popen[bytes]) -> Iterator[None]:
    """SIGINT and SIGTERM reach the trainer as SIGTERM, the second one as SIGKILL. An exception here kills it too."""
    signals = 0

    def cancel(number: int, frame: FrameType | None) -> None:
        nonlocal signals
        signals += 1
        trainer.terminate() if signals == 1 else trainer.kill()

    previous = {number: signal.signal(number, cancel) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except BaseException:
        trainer.kill()
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

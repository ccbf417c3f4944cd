"""`tuneserve run`: one fine-tuning run in the foreground, without a service. Torch-free: the trainer is a child process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from lm.errors import UserError
from service.jobs.trainer_process import TRAINER, trainer_environment
from service.settings import load_settings
from service.shipped import find_config, find_data
from trainer.config import Recipe, RunConfig, parse_options, read_config
from trainer.run_folder import RunFolder

RECIPES: dict[str, Recipe] = {"full_finetune_single_device": "full", "lora_finetune_single_device": "lora"}
"""torchtune's names of our recipes."""


def run_recipe(recipe: str, config: str, overrides: dict[str, Any]) -> int:
    """Train as the YAML file `config` says, in the folder `output_dir` that it or `overrides` name.

    By default that is a new folder in `runs` of the home. The terminal and the run's log.txt show the same bytes.
    Ctrl-C and SIGTERM cancel the run within a step, a second one kills it. Returns the trainer's exit code: 0 also for
    a cancelled run. Raises UserError before anything is written.
    """
    options = read_config(find_config(config), overrides)
    output_dir = options.pop("output_dir", None)
    run_config = _run_config(RECIPES[recipe], options)
    run = RunFolder(_output_dir(output_dir, recipe))
    run.path.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(run_config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    run.config.write_text(text, encoding="utf-8")
    print(f"run folder: {run.path}", file=sys.stderr, flush=True)
    exit_code = _train(run)
    for event in run.read_events()[0]:
        if event["type"] == "checkpoint" and event["final"]:
            print(run.path / event["path"])
    return exit_code


def _run_config(recipe: Recipe, options: dict[str, Any]) -> RunConfig:
    config = parse_options(RunConfig, {"recipe": recipe, **options})
    if config.recipe != recipe:
        raise UserError(f"recipe: the config says {config.recipe!r}, the command {recipe!r}", param="recipe")
    settings = load_settings(None, {"model": config.model}, os.environ)
    changes = {
        "model": str(settings.model_dir),
        "model_name": config.model_name or settings.model_name,
        "data_files": tuple(str(find_data(name)) for name in config.data_files),
    }
    return config.model_copy(update=changes)


def _output_dir(value: object, recipe: str) -> Path:
    if value is None:
        name = f"{recipe}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        return load_settings(None, {}, os.environ).runs_dir / name
    if not isinstance(value, str) or not value:
        raise UserError(f"output_dir: a folder is expected (got {value!r})", param="output_dir")
    folder = Path(value).expanduser().resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"output_dir: {folder} is not an empty folder; name a new one", param="output_dir")
    return folder


def _train(run: RunFolder) -> int:
    trainer = subprocess.Popen(
        [*TRAINER, str(run.path)],
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
    return trainer.returncode if trainer.returncode >= 0 else 128 - trainer.returncode


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

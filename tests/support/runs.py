"""Run folders of tiny fine-tuning runs, and the recipe run in this process."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from trainer.config import load_run_config
from trainer.progress import Progress
from trainer.recipe import Recipe
from trainer.recipes import RECIPES
from trainer.run_folder import RunFolder

RECORDS: list[dict[str, Any]] = [
    {"input": f"Question {number}: who are you{'?' * (number % 5)}", "output": "I am Tuna. " * (1 + number % 3)}
    for number in range(16)
]
"""Of several lengths, so that batches have padding and steps have different numbers of trained tokens."""


def make_run(folder: Path, model: Path, *, records: list[dict[str, Any]] | None = None, **options: Any) -> RunFolder:
    """A run folder with RECORDS (or `records`) as its data. Unless given: cpu, fp32, a step for each batch of 4."""
    folder.mkdir(parents=True)
    data = folder / "data.json"
    data.write_text(json.dumps(RECORDS if records is None else records, ensure_ascii=False), encoding="utf-8")
    defaults = {"device": "cpu", "dtype": "fp32", "batch_size": 4, "gradient_accumulation_steps": 1}
    config = {"model": str(model), "data_files": [str(data)], **defaults, **options}
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return RunFolder(folder)


def train_here(run: RunFolder, *, resume: bool = False, check: Callable[[], None] = lambda: None) -> Recipe:
    """Run it in this process, to its end. The recipe holds the trained model. `check` is called between the batches."""
    with Progress(run) as progress:
        recipe = begin(run, progress, resume=resume)
        recipe.check_cancelled = check
        recipe.train()
    return recipe


def begin(run: RunFolder, progress: Progress, *, resume: bool = False) -> Recipe:
    """The recipe of a run, ready to train."""
    config = load_run_config(run.config)
    recipe = RECIPES[config.recipe](config, run, progress, lambda: None)
    recipe.setup(resume=resume)
    return recipe


def events(run: RunFolder, type: str) -> list[dict[str, Any]]:
    return [event for event in run.read_events()[0] if event["type"] == type]


def losses(run: RunFolder) -> list[float]:
    return [event["loss"] for event in events(run, "step")]


def told_losses(run: RunFolder) -> dict[int, float]:
    """The loss of each step, as the last event about it says."""
    return {event["step"]: event["loss"] for event in events(run, "step")}


def weights(run: RunFolder) -> dict[str, bytes]:
    """Every file of weights that a run published, by its path there."""
    paths = [path for root in (run.adapters, run.checkpoints) for path in sorted(root.rglob("*.safetensors"))]
    return {str(path.relative_to(run.path)): path.read_bytes() for path in paths}


def table(run: RunFolder) -> list[dict[str, str]]:
    """The rows of metrics.csv."""
    with run.metrics.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))

"""Run folders of tiny fine-tuning runs, and the recipe run in this process."""

from __future__ import annotations

import json
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


def train_here(run: RunFolder) -> Recipe:
    """Run it in this process, to its end. The recipe holds the trained model."""
    with Progress(run) as progress:
        config = load_run_config(run.config)
        recipe = RECIPES[config.recipe](config, run, progress, lambda: None)
        recipe.setup()
        recipe.train()
    return recipe


def events(run: RunFolder, type: str) -> list[dict[str, Any]]:
    return [event for event in run.read_events()[0] if event["type"] == type]


def losses(run: RunFolder) -> list[float]:
    return [event["loss"] for event in events(run, "step")]

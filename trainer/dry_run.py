"""What a run would be like, found out without training: `python -m trainer.dry_run FOLDER`.

FOLDER holds the run's config.yaml and takes the tokens of a sample. Answers are lines of JSON on standard output, each
a part of the report as soon as it is known, so that who is out of patience has the parts before:
    {"part": "data", ...}      the dataset report of the sample, how many records there are in all, rendered examples
    {"part": "steps", ...}     steps, checkpoints, and what a batch looks like
    {"part": "speed", ...}     seconds of a step, measured on a single layer with random weights, or why not
    {"part": "error", ...}     a mistake of the user, after which nothing follows
"""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from lm.config import load_config
from lm.errors import UserError
from trainer.config import RunConfig, load_run_config
from trainer.data.batches import epoch_steps
from trainer.data.counting import count_records
from trainer.plan import Plan, plan_run
from trainer.prepare import RunData, prepare_data
from trainer.progress import Progress
from trainer.run_folder import RunFolder
from trainer.speed import BatchShape, measure_step

SAMPLE = 1000
"""Records of each data set that are looked at."""
STEPS_LOOKED_AT = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """The whole data, from a sample of them."""

    records: int
    scale: float
    """How many times the sample they are."""

    @property
    def is_sampled(self) -> bool:
        return self.scale != 1


def main() -> None:
    folder = RunFolder(Path(sys.argv[1]))
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer
    with answers:
        try:
            report(folder, answers)
        except UserError as error:
            tell(answers, "error", message=str(error), param=error.param)


def report(folder: RunFolder, answers: TextIO) -> None:
    """Raises UserError for a mistake in the configuration or in the sample."""
    config = load_run_config(folder.config).model_copy(update={"num_threads": 1})
    shape = load_config(Path(config.model))
    max_seq_len = min(config.max_seq_len, shape.max_position_embeddings)
    with Progress(folder) as progress:
        data = prepare_data(
            config,
            max_seq_len=max_seq_len,
            folder=folder,
            progress=progress,
            check_cancelled=lambda: None,
            sample=SAMPLE,
        )
    totals = count_all(config, data)
    tell(answers, "data", **_data(folder, data, totals))
    plan = plan_run(config, math.ceil(len(data.training) * totals.scale))
    batches = look_at_batches(config, data)
    tell(answers, "steps", **_steps(config, plan, batches, max_seq_len, data))
    tell(answers, "speed", **measure_step(config, shape, batches))


def tell(answers: TextIO, part: str, **values: Any) -> None:
    answers.write(json.dumps({"part": part, **values}) + "\n")
    answers.flush()


def count_all(config: RunConfig, data: RunData) -> Totals:
    """Sets count by how often their records are seen."""
    counts = [count_records(config, dataset) for dataset in config.training_sets]
    weights = [dataset.weight for dataset in config.training_sets]
    whole = sum(weight * count for weight, count in zip(weights, counts, strict=True))
    looked_at = sum(weight * min(count, SAMPLE) for weight, count in zip(weights, counts, strict=True))
    return Totals(records=sum(counts), scale=1.0 if max(counts) <= SAMPLE else whole / looked_at)


def _data(folder: RunFolder, data: RunData, totals: Totals) -> dict[str, Any]:
    events, _ = folder.read_events()
    return {
        "report": dict(data.report),
        "total_records": totals.records,
        "is_sampled": totals.is_sampled,
        "examples": next((event["examples"] for event in events if event["type"] == "examples"), []),
        "warnings": [event["message"] for event in events if event["type"] == "warning"],
    }


def look_at_batches(config: RunConfig, data: RunData) -> BatchShape:
    """The mean of the first steps; padding is part of a batch."""
    steps = itertools.islice(
        epoch_steps(
            data.training,
            batch_size=config.batch_size,
            accumulation=config.gradient_accumulation_steps,
            seed=config.seed,
            epoch=1,
        ),
        STEPS_LOOKED_AT,
    )
    taken = list(steps)
    batches = list(itertools.chain.from_iterable(taken))
    return BatchShape(
        rows=max(batch.input_ids.shape[0] for batch in batches),
        length=_mean([batch.input_ids.shape[1] for batch in batches]),
        tokens=_mean([batch.input_ids.numel() for batch in batches]),
        trained=_mean([batch.num_trained for batch in batches]),
        per_step=len(batches) / len(taken),
        processed_per_step=sum(batch.num_tokens for batch in batches) / len(taken),
    )


def _mean(numbers: Sequence[int]) -> int:
    return math.ceil(sum(numbers) / len(numbers))


def _steps(config: RunConfig, plan: Plan, batches: BatchShape, max_seq_len: int, data: RunData) -> dict[str, Any]:
    longest = max_seq_len if config.packed else min(max_seq_len, int(data.report["longest"]))
    return {
        "steps_per_epoch": plan.steps_per_epoch,
        "epochs": plan.epochs,
        "total_steps": plan.total_steps,
        "checkpoints": plan.num_checkpoints,
        "tokens_per_step": round(batches.processed_per_step),
        "padding": round(1 - batches.processed_per_step / (batches.tokens * batches.per_step), 4),
        "longest_row": longest,
    }


if __name__ == "__main__":
    main()

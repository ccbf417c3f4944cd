"""The answer to POST /finetune with `dry_run: true`."""

from __future__ import annotations

from typing import Any, Literal

from service.schemas.answers import Answer
from service.schemas.finetune_answers import DatasetAnswer
from trainer.config import Recipe


class SegmentAnswer(Answer):
    text: str
    trained: bool


class ExampleAnswer(Answer):
    answer: Literal["chosen", "rejected"] | None = None
    """Of a preference: which of its two answers this is."""
    segments: list[SegmentAnswer]
    """The record as the model sees it, divided where training begins and ends."""


class DataReport(DatasetAnswer):
    """Of the records that were looked at: the first 1000 of each dataset."""

    total_records: int
    """Of all datasets. In files of lines every line counts."""
    is_sampled: bool
    """Whether there are more records than were looked at. The other numbers are then those of the sample."""
    formats: dict[str, int]
    """How many records were written in which form."""
    examples: list[ExampleAnswer]
    warnings: list[str]


class StepsAnswer(Answer):
    steps_per_epoch: int
    epochs: int
    total_steps: int
    checkpoints: int
    tokens_per_step: int
    padding: float
    """Share of a batch that is padding, in the mean; `packed` and larger steps make it smaller."""
    longest_row: int


class MemoryAnswer(Answer):
    """Bytes on the device, from the shape of the model and of the longest batch."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    overhead: int
    total: int
    """The highest sum at one moment."""
    device_total: int | None
    device_free: int | None
    """While this service serves."""
    fits: bool | None
    """Whether the device holds that by itself."""


class DiskAnswer(Answer):
    """Bytes in the run folder."""

    checkpoint: int
    merged: int
    """The merged model at the end, where an adapter is trained."""
    state: int
    total: int
    """All that is there at one moment, at most."""
    free: int
    fits: bool


class TimeAnswer(Answer):
    """Measured on one layer with random weights, on the run's own device, with what else it did at that moment."""

    seconds_per_step: float
    total_seconds: float
    """All steps; checkpoints and validation not included."""
    trained_tokens_per_second: float
    processed_tokens_per_second: float


class DryRunAnswer(Answer):
    object: Literal["finetune.dry_run"] = "finetune.dry_run"
    model: str
    start_from: str | None
    recipe: Recipe
    config: dict[str, Any]
    """All training options as they would be in effect."""
    notes: list[str]
    """What of a configuration of torchtune was mapped rather than taken as it is."""
    device: str | None
    dtype: str | None
    dataset: DataReport | None
    """Null where the deadline came before, as with what follows."""
    steps: StepsAnswer | None
    memory: MemoryAnswer
    disk: DiskAnswer
    time: TimeAnswer | None
    serving: Literal["apart", "share", "sleep"] | None
    """What becomes of serving while the job trains: on another device, side by side, or asleep until its end."""
    serving_reason: str | None
    """Why, with the figures where they decide."""
    is_complete: bool
    """Whether everything was found out within `dry_run_seconds` of the service."""
    problems: list[str]
    """What is missing and why, and what would not fit."""

"""What /finetune answers: jobs, their events and figures."""

from __future__ import annotations

from typing import Any, Literal

from service.jobs.job import Job, Promote, Status
from service.schemas.answers import Answer
from trainer.config import Recipe
from trainer.option_groups import DatasetConfig


class JobErrorAnswer(Answer):
    code: str
    message: str
    param: str | None
    log_tail: str
    """The last lines that the trainer printed."""


class ProgressAnswer(Answer):
    step: int
    total_steps: int
    epoch: int


class LossesAnswer(Answer):
    train: float | None
    """Of the newest step: mean over its trained tokens."""
    validation: float | None
    """Of the newest measurement."""


class AccuracyAnswer(Answer):
    train: float | None
    """Share of the trained tokens of the newest step that the model held for the likeliest."""
    validation: float | None


class SpeedAnswer(Answer):
    trained: float | None
    """Tokens that the loss counts."""
    processed: float | None
    """All tokens, prompts included."""


class DatasetAnswer(Answer):
    records: int
    tokens: int
    trained_tokens: int
    """Of one pass over the data."""
    truncated: int
    """Records that were cut at max_seq_len."""
    longest: int
    """Tokens of the longest record."""
    validation_records: int
    rows: int | None = None
    """With `packed` how many rows the records fill."""
    skipped: int = 0
    """Records without a token to train on, which are left out."""
    fingerprint: str | None = None
    """Of the data as they are trained on; checkpoints name it."""


class JobAnswer(Answer):
    id: str
    object: Literal["finetune.job"] = "finetune.job"
    status: Status
    paused: bool
    """Whether the job waits for POST /finetune/{id}/resume."""
    error: JobErrorAnswer | None
    """Why the job failed."""
    created_at: int
    """Unix seconds, as are the other times."""
    started_at: int | None
    finished_at: int | None
    model: str
    """The base model."""
    start_from: str | None
    """The checkpoint that is trained further, where it is not the base itself."""
    merge_start: bool
    recipe: Recipe
    suffix: str
    promote: Promote
    priority: int
    metadata: dict[str, str]
    webhook: str | None
    datasets: list[dict[str, Any]]
    """What is trained on, as it was said, with paths inside the home of the service."""
    validation: dict[str, Any] | None
    """What is held out, where it is a dataset of its own."""
    config: dict[str, Any]
    """All training options as they are in effect; `epochs` is null until the data are counted, unless it was given."""
    notes: list[str]
    """What of a configuration of torchtune was mapped rather than taken as it is."""
    file_id: str | None
    queue_position: int | None
    """1 is next on its device. Null unless queued."""
    attempt: int
    """Which of its trainers this is: above 1 the run went on after a pause, or after trainer or service had stopped."""
    progress: ProgressAnswer | None
    eta_s: float | None
    """Seconds to the last step at the pace so far."""
    losses: LossesAnswer
    token_accuracy: AccuracyAnswer
    tokens_per_second: SpeedAnswer
    trained_tokens: int | None
    peak_memory_bytes: int | None
    device: str | None
    """The device that the trainer chose."""
    dtype: str | None
    dataset: DatasetAnswer | None
    """What was found in the data."""
    checkpoints: list[str]
    """What the job made so far, as names that `model` takes in /generate and /v1, oldest first."""
    fine_tuned_model: str | None
    """The checkpoint that the job is about, once it has succeeded."""


class JobList(Answer):
    object: Literal["list"] = "list"
    data: list[JobAnswer]
    has_more: bool


class EventList(Answer):
    object: Literal["list"] = "list"
    data: list[dict[str, Any]]
    """Each has `id` (its number within the job, from 1), `type`, `time`, and what its type brings."""
    has_more: bool


class MetricsAnswer(Answer):
    object: Literal["finetune.metrics"] = "finetune.metrics"
    steps: list[dict[str, Any]]
    """The trainer's figures of each step. A step that was done again after a resume stands there once."""
    validation: list[dict[str, Any]]
    """Loss, perplexity and token accuracy on the held-out records, after the steps where they were measured."""
    samples: list[dict[str, Any]]
    """What the model answered to `sample_prompts` then."""


class JobDeleted(Answer):
    id: str
    object: Literal["finetune.job.deleted"] = "finetune.job.deleted"
    deleted: bool = True


def job_answer(job: Job, *, checkpoints: list[str], queue_position: int | None) -> JobAnswer:
    started, dataset = job.progress.started or {}, job.progress.dataset
    step, validation = job.progress.step or {}, job.progress.validation or {}
    return JobAnswer(
        id=job.id,
        status=job.status,
        paused=job.paused,
        error=None if job.error is None else JobErrorAnswer.model_validate(job.error, from_attributes=True),
        created_at=int(job.created_at),
        started_at=_seconds(job.started_at),
        finished_at=_seconds(job.finished_at),
        model=job.model,
        start_from=job.start_from,
        merge_start=job.merge_start,
        recipe=job.options.recipe,
        suffix=job.suffix,
        promote=job.promote,
        priority=job.priority,
        metadata=dict(job.metadata),
        webhook=job.webhook,
        datasets=[_dataset(config) for config in job.datasets or (DatasetConfig(data_files=job.data_files),)],
        validation=None if job.validation is None else _dataset(job.validation),
        config={
            **job.options.model_dump(mode="json"),
            "learning_rate": job.options.peak_learning_rate,
            "epochs": job.options.epochs or started.get("epochs"),
        },
        notes=list(job.notes),
        file_id=job.file_id,
        queue_position=queue_position,
        attempt=job.attempt,
        progress=ProgressAnswer.model_validate(step) if step else None,
        eta_s=None if job.finished else job.progress.eta_s,
        losses=LossesAnswer(train=step.get("loss"), validation=validation.get("loss")),
        token_accuracy=AccuracyAnswer(train=step.get("token_accuracy"), validation=validation.get("token_accuracy")),
        tokens_per_second=SpeedAnswer(
            trained=step.get("trained_tokens_per_second"), processed=step.get("processed_tokens_per_second")
        ),
        trained_tokens=step.get("trained_tokens"),
        peak_memory_bytes=step.get("peak_memory_bytes"),
        device=started.get("device"),
        dtype=started.get("dtype"),
        dataset=None if dataset is None else DatasetAnswer.model_validate(dataset),
        checkpoints=checkpoints,
        fine_tuned_model=job.fine_tuned_model,
    )


def _dataset(config: DatasetConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude_none=True)


def _seconds(time: float | None) -> int | None:
    return None if time is None else int(time)

"""Answers of /v1/fine_tuning/jobs: our jobs and checkpoints in OpenAI's words."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from service.jobs.job import Job, JobError, Status
from service.registry import Entry
from service.schemas.answers import Answer, IfAsked
from service.schemas.fine_tuning import AUTO
from trainer.config import TrainingOptions
from trainer.option_groups import WandbConfig

JOB_PREFIX = "ftjob-"
INVALID_DATA = "invalid_training_file"
"""The code of a job that a mistake in its data ended, held-out ones included."""
TRAINING_FILE, VALIDATION_FILE = "training_file", "validation_file"
FIELDS = {
    "dataset.file_id": TRAINING_FILE,
    "dataset.data_files": TRAINING_FILE,
    "dataset": TRAINING_FILE,
    "data_files": TRAINING_FILE,
    "validation.file_id": VALIDATION_FILE,
    "validation.data_files": VALIDATION_FILE,
    "validation": VALIDATION_FILE,
    "tracking.wandb": "integrations",
    "tracking": "integrations",
}
"""What OpenAI's clients call a field of ours."""


class FineTuningError(Answer):
    code: str
    message: str
    param: str | None


class HyperparametersAnswer(Answer):
    n_epochs: int | Literal["auto"]
    """`auto` until the data are counted."""
    batch_size: int
    learning_rate_multiplier: float
    beta: Annotated[float | None, IfAsked] = None


class MethodPart(Answer):
    hyperparameters: HyperparametersAnswer


class MethodAnswer(Answer):
    type: Literal["supervised", "dpo"]
    supervised: Annotated[MethodPart | None, IfAsked] = None
    dpo: Annotated[MethodPart | None, IfAsked] = None


class IntegrationAnswer(Answer):
    type: Literal["wandb"] = "wandb"
    wandb: WandbConfig


class FineTuningJob(Answer):
    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    error: FineTuningError | None
    """Why the job failed."""
    estimated_finish: int | None
    """While it runs: Unix seconds of its end at the pace so far."""
    fine_tuned_model: str | None
    """The name of the result, once the job has succeeded."""
    finished_at: int | None
    hyperparameters: HyperparametersAnswer
    method: MethodAnswer
    model: str
    """What was trained: the base model, or the fine-tuned one that was trained further."""
    organization_id: str
    result_files: list[str]
    """The id of a CSV file in /v1/files with the figures of each step, once the job has succeeded."""
    seed: int
    status: Status
    """A paused job is `queued`."""
    trained_tokens: int | None
    """Tokens that the loss counted; null while the job runs."""
    training_file: str
    """Id of the file; for a job of POST /finetune without an uploaded file, where its data came from."""
    validation_file: str | None
    integrations: list[IntegrationAnswer]
    metadata: dict[str, str]


class FineTuningJobList(Answer):
    object: Literal["list"] = "list"
    data: list[FineTuningJob]
    has_more: bool


class CheckpointMetrics(Answer):
    step: int
    train_loss: float | None
    train_mean_token_accuracy: float | None
    valid_loss: float | None
    valid_mean_token_accuracy: float | None
    full_valid_loss: float | None
    """The same as valid_loss: all held-out records are measured."""
    full_valid_mean_token_accuracy: float | None


class FineTuningCheckpoint(Answer):
    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    """A name that `model` takes, as long as the checkpoint is there."""
    fine_tuning_job_id: str
    metrics: CheckpointMetrics
    step_number: int


class FineTuningCheckpointList(Answer):
    object: Literal["list"] = "list"
    data: list[FineTuningCheckpoint]
    first_id: str | None
    last_id: str | None
    has_more: bool


def fine_tuning_job(job: Job, *, organization: str) -> FineTuningJob:
    is_dpo = job.options.recipe == "dpo"
    part = MethodPart(hyperparameters=_hyperparameters(job, with_beta=is_dpo))
    wandb = job.options.tracking.wandb
    return FineTuningJob(
        id=job.id,
        created_at=int(job.created_at),
        error=None if job.error is None else _error(job, job.error),
        estimated_finish=_estimated_finish(job),
        fine_tuned_model=job.fine_tuned_model,
        finished_at=None if job.finished_at is None else int(job.finished_at),
        hyperparameters=_hyperparameters(job),
        method=MethodAnswer(type="dpo", dpo=part) if is_dpo else MethodAnswer(type="supervised", supervised=part),
        model=job.start_from or job.model,
        organization_id=organization,
        result_files=list(job.result_files),
        seed=job.options.seed,
        status=job.status,
        trained_tokens=(job.progress.step or {}).get("trained_tokens") if job.finished else None,
        training_file=training_file(job),
        validation_file=job.validation_file_id,
        integrations=[] if wandb is None else [IntegrationAnswer(wandb=wandb)],
        metadata=dict(job.metadata),
    )


def training_file(job: Job) -> str:
    """The uploaded file, else the first place where the data came from."""
    places = (job.file_id, *job.data_files, *(dataset.hub_id for dataset in job.datasets))
    return next((place for place in places if place), "")


def _hyperparameters(job: Job, *, with_beta: bool = False) -> HyperparametersAnswer:
    options, started = job.options, job.progress.started or {}
    return HyperparametersAnswer(
        n_epochs=options.epochs or started.get("epochs") or AUTO,
        batch_size=options.batch_size * options.gradient_accumulation_steps,
        learning_rate_multiplier=_multiplier(options),
        beta=options.dpo.beta if with_beta else None,
    )


def _multiplier(options: TrainingOptions) -> float:
    """Rounded, so that 0.1 is told as 0.1."""
    usual = options.model_copy(update={"learning_rate": None}).peak_learning_rate
    return float(f"{options.peak_learning_rate / usual:.12g}")


def _error(job: Job, error: JobError) -> FineTuningError:
    param, message = error.param and FIELDS.get(error.param, error.param), error.message
    if error.param is None and error.code == INVALID_DATA:
        held_out = job.validation_file_id
        param = VALIDATION_FILE if held_out is not None and held_out in message else TRAINING_FILE
    if error.param is not None and param is not None and message.startswith(f"{error.param}:"):
        message = param + message.removeprefix(error.param)
    return FineTuningError(code=error.code, message=message, param=param)


def _estimated_finish(job: Job) -> int | None:
    if job.status != "running" or job.progress.step is None or (eta := job.progress.eta_s) is None:
        return None
    return int(job.progress.step["time"] + eta)


def checkpoint_id(entry: Entry) -> str:
    return f"ftckpt_{(entry.job_id or '').removeprefix(JOB_PREFIX)}_{entry.step}"


def fine_tuning_checkpoint(entry: Entry) -> FineTuningCheckpoint:
    return FineTuningCheckpoint(
        id=checkpoint_id(entry),
        created_at=int(entry.created_at),
        fine_tuned_model_checkpoint=entry.id,
        fine_tuning_job_id=entry.job_id or "",
        metrics=CheckpointMetrics(
            step=entry.step or 0,
            train_loss=entry.train_loss,
            train_mean_token_accuracy=entry.token_accuracy,
            **_validation(entry.validation_loss, entry.validation_token_accuracy),
        ),
        step_number=entry.step or 0,
    )


def _validation(loss: float | None, token_accuracy: float | None) -> dict[str, Any]:
    return {
        "valid_loss": loss,
        "valid_mean_token_accuracy": token_accuracy,
        "full_valid_loss": loss,
        "full_valid_mean_token_accuracy": token_accuracy,
    }

"""The events of a job as OpenAI tells them: figures of a step, and messages for people."""

from __future__ import annotations

from typing import Any, Literal

from service.jobs.job import Job
from service.jobs.store import JobEvent
from service.schemas.answers import Answer
from service.schemas.fine_tuning_answers import JOB_PREFIX, training_file

WARNINGS = ("warning", "promotion_failed", "not_promoted")
MESSAGES = {
    "validating_files": "Validating training file: {training_file}",
    "queued": "The job waits for its device",
    "running": "Fine-tuning job started",
    "started": "Training on {device} in {dtype}: {total_steps} steps",
    "dataset": "Training file read: {records} records, {trained_tokens} trained tokens, {truncated} records cut",
    "examples": "First records as they are trained on",
    "samples": "Answers to the sample prompts after step {step}",
    "checkpoint": "Checkpoint created at step {step}",
    "checkpoint_removed": "Checkpoint of step {step} removed, as keep_last_n_checkpoints says",
    "early_stopped": "Stopped at step {step}: the validation loss has not fallen since step {best_step}",
    "resumed": "Training goes on after step {step}",
    "pausing": "The job is being paused",
    "paused": "The job is paused",
    "cancelling": "The job is being cancelled",
    "promoted": "{model} answers from now on",
    "succeeded": "The job has successfully completed; new fine-tuned model created: {fine_tuned_model}",
    "cancelled": "The job has been cancelled",
}
NUMBERS = ("id", "type", "time")


class FineTuningEvent(Answer):
    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    """`metrics` after each step and each measurement of the held-out records."""
    data: dict[str, Any]
    """Of metrics: step, total_steps, and train_loss and train_mean_token_accuracy, or valid_loss,
    valid_mean_token_accuracy and the same two with `full_`. Of a message what it is about."""


class FineTuningEventList(Answer):
    object: Literal["list"] = "list"
    data: list[FineTuningEvent]
    has_more: bool


def event_prefix(job: Job) -> str:
    """What the ids of its events begin with; their number follows."""
    return f"ftevent-{job.id.removeprefix(JOB_PREFIX)}-"


def fine_tuning_event(job: Job, event: JobEvent) -> FineTuningEvent:
    figures = _step(event) if event["type"] == "step" else _validation(job, event)
    level: Literal["info", "warn", "error"] = "info"
    if event["type"] == "failed":
        level = "error"
    elif event["type"] in WARNINGS:
        level = "warn"
    return FineTuningEvent(
        id=f"{event_prefix(job)}{event['id']}",
        created_at=int(event["time"]),
        level=level,
        message=_message(job, event) if figures is None else _figures_message(figures),
        type="message" if figures is None else "metrics",
        data={key: value for key, value in event.items() if key not in NUMBERS} if figures is None else figures,
    )


def _step(event: JobEvent) -> dict[str, Any]:
    return {
        "step": event["step"],
        "total_steps": event["total_steps"],
        "train_loss": event["loss"],
        "train_mean_token_accuracy": event.get("token_accuracy"),
    }


def _validation(job: Job, event: JobEvent) -> dict[str, Any] | None:
    """None for an event that is no measurement."""
    if event["type"] != "validation":
        return None
    known = job.progress.step or job.progress.started or {}
    figures = {"valid_loss": event["loss"], "valid_mean_token_accuracy": event.get("token_accuracy")}
    whole = {f"full_{name}": value for name, value in figures.items()}
    return {"step": event["step"], "total_steps": known.get("total_steps"), **figures, **whole}


def _figures_message(figures: dict[str, Any]) -> str:
    name, key = ("training", "train_loss") if "train_loss" in figures else ("validation", "valid_loss")
    return f"Step {figures['step']}/{figures['total_steps']}: {name} loss={figures[key]:.4f}"


def _message(job: Job, event: JobEvent) -> str:
    """An event's own words, else ours for its type."""
    if event.get("message"):
        return str(event["message"])
    known = {"training_file": training_file(job), "fine_tuned_model": None, **event}
    try:
        return MESSAGES[event["type"]].format_map(known)
    except KeyError:  # a type that is new, or one that an older trainer told in less detail
        return str(event["type"]).replace("_", " ")

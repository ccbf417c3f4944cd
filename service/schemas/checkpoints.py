"""Answers of /checkpoints."""

from __future__ import annotations

from typing import Any, Literal

from lm.gguf_export import GgufType
from service.registry import Kind
from service.schemas.answers import Answer


class CheckpointAnswer(Answer):
    id: str
    """What `model` takes in /generate and /v1."""
    object: Literal["checkpoint"] = "checkpoint"
    kind: Kind
    """`base`: a base model. `adapter`: a LoRA adapter on its base. `full`: a whole model."""
    base: str
    path: str | None
    """The folder, relative to the home of the service. Null for a base model that lies elsewhere."""
    job_id: str | None
    step: int | None
    created_at: int
    train_loss: float | None
    """Of the step that it was saved after."""
    validation_loss: float | None
    servable: bool
    """False for checkpoints of another base model than the one that this service serves."""
    loaded: bool
    """Whether the engine holds its weights now."""
    served: bool
    """Whether it answers requests that name no model, or `latest`."""


class CheckpointFile(Answer):
    name: str
    bytes: int


class CheckpointDetails(CheckpointAnswer):
    facts: dict[str, Any] | None
    """What its tuneserve.json says: job, step, fingerprint of the data, losses, base model, options. Null for a base
    model, and for checkpoints of earlier versions."""
    files: list[CheckpointFile]


class ExportAnswer(Answer):
    object: Literal["checkpoint.export"] = "checkpoint.export"
    model: str
    type: GgufType
    status: Literal["none", "running", "ready", "failed"]
    bytes: int | None
    error: str | None
    """Why it failed."""


class CheckpointList(Answer):
    object: Literal["list"] = "list"
    data: list[CheckpointAnswer]
    served: str | None
    served_since: int | None
    """Unix seconds; null for a base model that never gave way to a checkpoint."""
    problems: list[str]
    """What should be served and could not be loaded, with the reason."""

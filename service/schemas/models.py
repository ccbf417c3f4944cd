"""What POST /models takes and answers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from service.schemas.answers import Answer
from trainer.strict import Strict

MAX_NAME = 96
"""Characters of a model's name, which is part of the ids of what is fine-tuned from it."""


class ModelRequest(Strict):
    path: str = Field(min_length=1, max_length=4096)
    """Folder of the model, relative to models/ in the home of the service."""
    name: str | None = Field(default=None, min_length=1, max_length=MAX_NAME)
    """Name of the model in requests. Default: the folder's own name."""


class BaseModelAnswer(Answer):
    id: str
    """What `model` takes in /finetune and, where this service serves it, in /generate and /v1."""
    object: Literal["model"] = "model"
    kind: Literal["base"] = "base"
    path: str | None
    """The folder, relative to the home of the service."""
    created_at: int
    family: str
    parameters: int
    context_length: int
    weights: str
    """Layout of the weights: `safetensors`, or what the files' names begin with, as `pytorch_model` or `consolidated`."""
    tokenizer: str
    """File and kind of the tokenizer."""
    servable: bool
    """Whether this service serves this base model; if not, start one with `model=` and this id."""

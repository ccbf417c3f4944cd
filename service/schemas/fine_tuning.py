"""Bodies of /v1/fine_tuning/jobs, as OpenAI's clients send them, and what they mean as options of ours."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, field_validator, model_validator

from service.schemas.finetune import Metadata
from trainer.config import TrainingOptions
from trainer.option_groups import WandbConfig
from trainer.strict import Strict, parse_options

AUTO: Literal["auto"] = "auto"
MAX_SUFFIX = 64
MAX_SEED = 2**31 - 1


def _auto_is_default(value: object) -> object:
    return None if isinstance(value, str) and value == AUTO else value


def _or_auto(**schema: object) -> tuple[BeforeValidator, WithJsonSchema]:
    """What a hyperparameter takes besides a number; both `auto` and null are None to us."""
    return BeforeValidator(_auto_is_default), WithJsonSchema({"anyOf": [{"const": AUTO}, schema, {"type": "null"}]})


_epochs_schema = _or_auto(type="integer", minimum=1, maximum=50)
_batch_schema = _or_auto(type="integer", minimum=1, maximum=256)
_rate_schema = _or_auto(type="number", minimum=1e-6, maximum=1000)
_beta_schema = _or_auto(type="number", exclusiveMinimum=0, maximum=2)


class Hyperparameters(Strict):
    n_epochs: Annotated[Annotated[int, Field(ge=1, le=50)] | None, *_epochs_schema] = None
    """Passes over the data. `auto`: 3, or as many as 48 steps take."""
    batch_size: Annotated[Annotated[int, Field(ge=1, le=256)] | None, *_batch_schema] = None
    """Records of a step. `auto`: 4."""
    learning_rate_multiplier: Annotated[Annotated[float, Field(ge=1e-6, le=1000)] | None, *_rate_schema] = None
    """Factor on the learning rate that is usual for the method: 5e-4, for dpo 5e-5."""


class DpoHyperparameters(Hyperparameters):
    beta: Annotated[Annotated[float, Field(gt=0, le=2)] | None, *_beta_schema] = None
    """How strongly the model is held to what it was. `auto`: 0.1."""


class SupervisedMethod(Strict):
    hyperparameters: Hyperparameters | None = None


class DpoMethod(Strict):
    hyperparameters: DpoHyperparameters | None = None


class Method(Strict):
    type: Literal["supervised", "dpo"]
    """`supervised` learns the answers of conversations, `dpo` which of two answers is preferred. Both train an adapter."""
    supervised: SupervisedMethod | None = None
    dpo: DpoMethod | None = None

    @model_validator(mode="after")
    def _is_about_its_type(self) -> Method:
        other = "dpo" if self.type == "supervised" else "supervised"
        if getattr(self, other) is not None:
            raise ValueError(f"type is {self.type}, and {other} belongs to another type; remove it")
        return self

    @property
    def hyperparameters(self) -> Hyperparameters:
        said = self.supervised if self.type == "supervised" else self.dpo
        return (said and said.hyperparameters) or DpoHyperparameters()


class Integration(Strict):
    type: Literal["wandb"]
    wandb: WandbConfig


class FineTuningRequest(Strict):
    """POST /v1/fine_tuning/jobs. Only `model` and `training_file` are required."""

    model: str
    """The model to train: one of GET /v1/models. A fine-tuned one is trained further."""
    training_file: str
    """A file of /v1/files with the purpose fine-tune: conversations, prompts with completions, or for dpo preferences."""
    validation_file: str | None = None
    """Records to measure the loss on, which are not trained."""
    method: Method | None = None
    """Default: supervised."""
    hyperparameters: Annotated[Hyperparameters | None, Field(json_schema_extra={"deprecated": True})] = None
    """Those of the supervised method, where `method` is not given."""
    suffix: Annotated[str, Field(min_length=1, max_length=MAX_SUFFIX)] | None = None
    """Part of the model's name, `ft:<model>:<organization>:<suffix>:<id>`. What cannot stand there becomes `-`."""
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    """Default: one is drawn; the job tells which."""
    metadata: Metadata | None = None
    integrations: Annotated[list[Integration], Field(max_length=5)] | None = None
    """Weights & Biases, whose key is the service's own."""

    @field_validator("suffix")
    @classmethod
    def _fits_a_name(cls, value: str | None) -> str | None:
        fitting = re.sub(r"[^A-Za-z0-9._-]+", "-", value or "").strip("._-")
        if value is not None and not fitting:
            raise ValueError("it needs a letter or a digit, of A-Z, a-z and 0-9")
        return fitting or None

    @field_validator("integrations")
    @classmethod
    def _is_one(cls, value: list[Integration] | None) -> list[Integration] | None:
        if value is not None and len(value) > 1:
            raise ValueError("one integration with wandb is taken; remove the others")
        return value

    @model_validator(mode="after")
    def _says_it_once(self) -> FineTuningRequest:
        if self.method is not None and self.hyperparameters is not None:
            raise ValueError("hyperparameters and method say two things; put them into method")
        return self

    def options(self, seed: int) -> TrainingOptions:
        """With `seed` where the request has none."""
        method = self.method or Method(type="supervised")
        wanted = self.hyperparameters or method.hyperparameters
        is_dpo = method.type == "dpo"
        options: dict[str, Any] = {
            "recipe": "dpo" if is_dpo else "lora",
            "data_format": "preference" if is_dpo else "auto",
            "seed": seed if self.seed is None else self.seed,
            "epochs": wanted.n_epochs,
        }
        if wanted.batch_size is not None:
            options["batch_size"] = wanted.batch_size
        if isinstance(wanted, DpoHyperparameters) and wanted.beta is not None and is_dpo:
            options["dpo"] = {"beta": wanted.beta}
        if self.integrations:
            options["tracking"] = {"wandb": self.integrations[0].wandb.model_dump()}
        usual = parse_options(TrainingOptions, options)
        if wanted.learning_rate_multiplier is None:
            return usual
        rate = min(1.0, usual.peak_learning_rate * wanted.learning_rate_multiplier)
        return parse_options(TrainingOptions, {**options, "learning_rate": rate})

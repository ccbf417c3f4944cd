"""Bodies of /finetune. What may be said about the training itself is `TrainingOptions`, field by field."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from service.jobs.job import Promote
from service.schemas.datasets import DatasetRequest, Datasets, named_datasets
from trainer.config import Recipe, TrainingOptions
from trainer.strict import Strict

Suffix = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Metadata = Annotated[
    dict[Annotated[str, Field(min_length=1, max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=16),
]


class WebhookRequest(Strict):
    url: Annotated[str, Field(pattern=r"^https?://[^\s/?#]+", max_length=2000)]
    """Where to send a POST once the job is over. It is signed as Standard Webhooks has it, with the service's secret."""


class JobOptions(Strict):
    """What may be said about a job besides its training."""

    validation: DatasetRequest | None = None
    """Records that are held out, in place of `validation_split`."""
    suffix: Suffix | None = None
    """Part of the name of the result, `ft:<model>:<organization>:<suffix>:<id>`. Letters, digits, `.`, `_` and `-`."""
    promote: Promote = "final"
    """When a checkpoint begins to answer: the last one at the end (`final`), `each` as it appears, the one with the
    `best` validation loss at the end, or none by itself (`manual`)."""
    merge_start: bool = False
    """Where `model` is an adapter: merge it into the base first, and train a new one."""
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    """Jobs with a higher one start first on a device; among equals the oldest."""
    metadata: Metadata | None = None
    """Up to 16 pairs of texts, which are told again wherever the job is."""
    webhook: WebhookRequest | None = None
    """Who is told when the job is over."""
    dry_run: bool = False
    """Train nothing: answer with a report on the data, the number of steps, and an estimate of memory and time."""

    @field_validator("validation")
    @classmethod
    def _has_no_weight(cls, value: DatasetRequest | None) -> DatasetRequest | None:
        if value is not None and value.weight != 1:
            raise ValueError("weight is for datasets that are trained on; remove it")
        return value


class FinetuneRequest(TrainingOptions, JobOptions):
    """POST /finetune. Only `model` and `dataset` are required."""

    model: str
    """The model to train: one of GET /v1/models. A fine-tuned one is trained further."""
    dataset: Datasets
    """The data, or a list of several whose records are mixed."""

    @model_validator(mode="after")
    def _one_validation(self) -> FinetuneRequest:
        if self.validation is not None and self.validation_split > 0:
            raise ValueError("validation and validation_split say two things; remove one")
        return self

    @model_validator(mode="after")
    def _one_source(self) -> FinetuneRequest:
        for dataset in self.datasets().values() if self.source != "auto" else ():
            if dataset.data_files is None:
                raise ValueError("source belongs to data_files; remove it")
            if dataset.source not in (None, self.source):
                raise ValueError(f"source {self.source} and dataset.source {dataset.source} differ; remove one")
        return self

    def options(self) -> TrainingOptions:
        return TrainingOptions(**{name: getattr(self, name) for name in TrainingOptions.model_fields})

    def datasets(self) -> dict[str, DatasetRequest]:
        return named_datasets(self.dataset, "dataset")


class TorchtuneRequest(JobOptions):
    """POST /finetune with a configuration of torchtune. Only `config` is required."""

    config: dict[str, Any] | str
    """torchtune's configuration: an object, or the text of its YAML file. Names behind `_component_` are looked up in a
    list, never imported (docs/torchtune.md). `checkpoint_dir` is a model in models/, `data_files` lie in data/."""
    recipe: Recipe | None = None
    """Default: `lora` where config.model is a lora_* builder, else `full`; `dpo` where config.dataset has preferences."""
    model: str | None = None
    """The base model, in place of config.checkpointer.checkpoint_dir."""
    dataset: Datasets | None = None
    """The data, in place of config.dataset."""

    @field_validator("config", mode="before")
    @classmethod
    def _is_readable(cls, value: object) -> object:
        if isinstance(value, dict | str):
            return value
        raise ValueError("an object, or the text of a YAML file, is expected")


def _form(body: object) -> str:
    return CONFIG_FORM if isinstance(body, dict) and "config" in body else OPTIONS_FORM


OPTIONS_FORM, CONFIG_FORM = "options", "torchtune"
AnyFinetuneRequest = Annotated[
    Annotated[FinetuneRequest, Tag(OPTIONS_FORM)] | Annotated[TorchtuneRequest, Tag(CONFIG_FORM)],
    Discriminator(_form),
]
"""A body with `config` is a TorchtuneRequest."""

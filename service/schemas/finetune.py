"""Bodies of /finetune. What may be said about the training itself is `TrainingOptions`, field by field."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from service.jobs.job import Job, Promote, Status
from service.schemas.answers import Answer
from trainer.config import Recipe, TrainingOptions
from trainer.data.options import Source
from trainer.strict import Strict

MAX_INLINE_RECORDS = 10_000
MAX_DATA_FILES = 1000


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


ONE_FILE = {"type": "string"}
DataFiles = Annotated[
    list[str],
    BeforeValidator(_as_list),
    Field(min_length=1, max_length=MAX_DATA_FILES),
    WithJsonSchema(
        {"anyOf": [ONE_FILE, {"type": "array", "items": ONE_FILE, "minItems": 1, "maxItems": MAX_DATA_FILES}]}
    ),
]


Suffix = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class DatasetRequest(Strict):
    """Exactly one of `records`, `file_id` and `data_files`."""

    records: Annotated[list[Any], Field(max_length=MAX_INLINE_RECORDS)] | None = None
    """The records themselves: {"input", "output"} or {"messages": [{"role", "content"}, ...]} each, or another form that
    `data_format` describes."""
    file_id: str | None = None
    """A file that was uploaded to /v1/files with the purpose fine-tune."""
    data_files: DataFiles | None = None
    """One or more JSON, JSONL, CSV, Parquet or text files, as paths inside the data folder of the service."""
    source: Source | None = None
    """The same as `source` beside the options, as in datasets.load_dataset. It belongs to data_files."""

    @model_validator(mode="after")
    def _one_form(self) -> DatasetRequest:
        forms = ("records", "file_id", "data_files")
        given = [form for form in forms if getattr(self, form) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(forms)}; {' and '.join(given) or 'none'} is given")
        if self.source is not None and self.data_files is None:
            raise ValueError("source belongs to data_files; remove it")
        return self


class FinetuneRequest(TrainingOptions):
    """POST /finetune. Only `model` and `dataset` are required."""

    model: str
    """The base model to train: a name of GET /v1/models that is not itself fine-tuned."""
    dataset: DatasetRequest
    suffix: Suffix | None = None
    """Part of the name of the result, `ft:<model>:<organization>:<suffix>:<id>`. Letters, digits, `.`, `_` and `-`."""
    promote: Promote = "final"
    """When a checkpoint begins to answer: the last one at the end (`final`), `each` as it appears, the one with the
    `best` validation loss at the end, or none by itself (`manual`)."""

    @field_validator("promote")
    @classmethod
    def _best_is_measured(cls, value: Promote, info: ValidationInfo) -> Promote:
        if value == "best" and info.data.get("validation_split") == 0:
            raise ValueError("best needs a validation loss; set validation_split above 0, such as 0.1")
        return value

    @model_validator(mode="after")
    def _one_source(self) -> FinetuneRequest:
        if self.source == "auto":
            return self
        if self.dataset.data_files is None:
            raise ValueError("source belongs to data_files; remove it")
        if self.dataset.source not in (None, self.source):
            raise ValueError(f"source {self.source} and dataset.source {self.dataset.source} differ; remove one")
        return self

    def options(self) -> TrainingOptions:
        named = {name: getattr(self, name) for name in TrainingOptions.model_fields}
        return TrainingOptions(**named | {"source": self.dataset.source or self.source})


class TorchtuneRequest(Strict):
    """POST /finetune with a configuration of torchtune. Only `config` is required."""

    config: dict[str, Any] | str
    """torchtune's configuration: an object, or the text of its YAML file. Names behind `_component_` are looked up in a
    list, never imported (docs/torchtune.md). `checkpoint_dir` is a model in models/, `data_files` lie in data/."""
    recipe: Recipe | None = None
    """Default: `lora` where config.model is a lora_* builder, else `full`."""
    model: str | None = None
    """The base model, in place of config.checkpointer.checkpoint_dir."""
    dataset: DatasetRequest | None = None
    """The data, in place of config.dataset.data_files."""
    suffix: Suffix | None = None
    """As in a request without `config`."""
    promote: Literal["final", "each", "manual"] = "final"
    """As in a request without `config`."""

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
    """Of the newest checkpoint."""


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


class JobAnswer(Answer):
    id: str
    object: Literal["finetune.job"] = "finetune.job"
    status: Status
    error: JobErrorAnswer | None
    """Why the job failed."""
    created_at: int
    """Unix seconds, as are the other times."""
    started_at: int | None
    finished_at: int | None
    model: str
    """The base model."""
    recipe: Recipe
    suffix: str
    promote: Promote
    config: dict[str, Any]
    """All training options as they are in effect; `epochs` is null until the data are counted, unless it was given."""
    notes: list[str]
    """What of a configuration of torchtune was mapped rather than taken as it is."""
    file_id: str | None
    queue_position: int | None
    """1 is next on its device. Null unless queued."""
    attempt: int
    """Above 1 after the service was stopped while the job ran: it begins again."""
    progress: ProgressAnswer | None
    eta_s: float | None
    """Seconds to the last step at the pace so far."""
    losses: LossesAnswer
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
    """The trainer's figures of each step."""
    validation: list[dict[str, Any]]


def job_answer(job: Job, *, checkpoints: list[str], queue_position: int | None) -> JobAnswer:
    started, dataset = job.progress.started or {}, job.progress.dataset
    step, validation = job.progress.step or {}, job.progress.validation or {}
    return JobAnswer(
        id=job.id,
        status=job.status,
        error=None if job.error is None else JobErrorAnswer.model_validate(job.error, from_attributes=True),
        created_at=int(job.created_at),
        started_at=_seconds(job.started_at),
        finished_at=_seconds(job.finished_at),
        model=job.model,
        recipe=job.options.recipe,
        suffix=job.suffix,
        promote=job.promote,
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


def _seconds(time: float | None) -> int | None:
    return None if time is None else int(time)

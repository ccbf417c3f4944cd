"""What a request says about data to train on or to measure with: where they are, and how they are read."""

from __future__ import annotations

from typing import Annotated, Any

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

from trainer.option_groups import DatasetConfig, DatasetReading, is_a_split

MAX_INLINE_RECORDS = 10_000
MAX_DATA_FILES = 1000
MAX_DATASETS = 64
PLACES = ("records", "file_id", "data_files", "hub_id")
READING = ("source", "data_format", "column_map", "new_system_prompt", "prompt_template", "split")


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


class DatasetRequest(DatasetReading):
    """Exactly one of `records`, `file_id`, `data_files` and `hub_id`. What is not said here about reading is as the
    options beside `dataset` say."""

    records: Annotated[list[Any], Field(max_length=MAX_INLINE_RECORDS)] | None = None
    """The records themselves: {"input", "output"} or {"messages": [{"role", "content"}, ...]} each, or another form that
    `data_format` describes."""
    file_id: str | None = None
    """A file that was uploaded to /v1/files with the purpose fine-tune."""
    data_files: DataFiles | None = None
    """One or more JSON, JSONL, CSV, Parquet or text files, as paths inside the data folder of the service."""

    @field_validator("split")
    @classmethod
    def _is_a_split(cls, value: str | None, info: ValidationInfo) -> str | None:
        return None if value is None else is_a_split(value, any_name=info.data.get("hub_id") is not None)

    @model_validator(mode="after")
    def _one_form(self) -> DatasetRequest:
        given = [form for form in PLACES if getattr(self, form) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(PLACES)}; {' and '.join(given) or 'none'} is given")
        if self.source is not None and self.data_files is None:
            raise ValueError("source belongs to data_files; remove it")
        if self.hub_config is not None and self.hub_id is None:
            raise ValueError("hub_config belongs to hub_id; remove it")
        return self

    def in_files(self, files: tuple[str, ...] | None) -> DatasetConfig:
        """As the trainer is told it, the records being in `files`."""
        same = {name: getattr(self, name) for name in (*READING, "hub_id", "hub_config", "weight")}
        return DatasetConfig(data_files=files, **same)


def _number(value: object) -> str:
    return SEVERAL if isinstance(value, list | tuple) else ONE


ONE, SEVERAL = "(one)", "(several)"
"""Tags, which error messages leave out of the path of a field: see `errors.py`."""

Datasets = Annotated[
    Annotated[DatasetRequest, Tag(ONE)]
    | Annotated[list[DatasetRequest], Field(min_length=1, max_length=MAX_DATASETS), Tag(SEVERAL)],
    Discriminator(_number),
]
"""One dataset, or a list of them, whose records are mixed."""


def named_datasets(datasets: DatasetRequest | list[DatasetRequest], where: str) -> dict[str, DatasetRequest]:
    """By what error messages call each: `dataset`, or `dataset.0`, `dataset.1`, ..."""
    if isinstance(datasets, DatasetRequest):
        return {where: datasets}
    return {f"{where}.{number}": dataset for number, dataset in enumerate(datasets)}

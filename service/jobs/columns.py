"""A job as a row of the database, and back. What is no plain value is JSON there."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

from pydantic import BaseModel

from service.jobs.job import Job, JobError, Progress
from trainer.config import TrainingOptions
from trainer.option_groups import DatasetConfig

FLAGS = ("paused", "merge_start", "cancel_requested", "pause_requested")
LISTS = ("data_files", "notes", "file_ids", "result_files")


def column(value: Any) -> Any:
    """What is stored for the value of a field of `Job`."""
    if isinstance(value, BaseModel):
        return value.model_dump_json(exclude_unset=isinstance(value, DatasetConfig))
    if isinstance(value, tuple | list | Mapping) or is_dataclass(value):
        return json.dumps(value, default=_plain)
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_unset=True)
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return dict(value)  # a mapping that is no dict


def job_of(row: sqlite3.Row) -> Job:
    columns = {name: row[name] for name in Job.__slots__}
    error, validation = json.loads(columns["error"] or "null"), columns["validation"]
    return Job(
        **{
            **columns,
            **{name: bool(columns[name]) for name in FLAGS},
            **{name: tuple(json.loads(columns[name])) for name in LISTS},
            "options": TrainingOptions.model_validate_json(columns["options"]),
            "datasets": tuple(
                DatasetConfig.model_validate_json(json.dumps(each)) for each in json.loads(columns["datasets"])
            ),
            "validation": None if validation is None else DatasetConfig.model_validate_json(validation),
            "metadata": json.loads(columns["metadata"]),
            "progress": Progress(**json.loads(columns["progress"])),
            "error": error and JobError(**error),
        }
    )

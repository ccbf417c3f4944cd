"""From what a client asks for to a job, whichever API asked. Knows no HTTP and no torch."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lm.config import load_config
from lm.errors import UserError
from service.datasets import HELD_OUT, DatasetTaker, TakenDataset
from service.errors import conflict
from service.jobs.job import Job, Promote, new_id
from service.registry import Entry, Registry
from service.schemas.datasets import DatasetRequest
from service.services import Services
from trainer.config import TrainingOptions
from trainer.option_groups import DatasetConfig
from trainer.tracking import check_tracking


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """One job, as its client describes it."""

    model: str
    """A base model, or an entry of the registry that is trained further: `ft:...`."""
    options: TrainingOptions
    datasets: Mapping[str, DatasetRequest]
    """By what error messages call each: see `named_datasets`."""
    validation: DatasetRequest | None = None
    suffix: str = ""
    promote: Promote = "final"
    merge_start: bool = False
    """Merge the adapter that `model` is into the base first, and train a new one."""
    priority: int = 0
    metadata: Mapping[str, str] = field(default_factory=dict)
    webhook: str | None = None
    """URL that is told of its end."""
    notes: tuple[str, ...] = ()
    idempotency_key: str | None = None
    request_hash: str | None = None
    """Of the body that came with the key: the same key with another body is refused."""
    calls: Mapping[str, str] = field(default_factory=dict)
    """What the client calls a field, where it is not its name here: {"dataset.file_id": "training_file"}."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What a job begins with."""

    base: str
    entry: Entry | None
    """The checkpoint that is trained further; None for the base itself."""


async def create_job(services: Services, spec: JobSpec) -> Job:
    """Check everything that can be checked at once, keep the data, and take the job. A key that was used before gives
    the job that it made then.

    Raises UserError in the client's words, NotFoundError, and ApiError 409 for a key of another request.
    """
    earlier = _earlier(services, spec)
    if earlier is not None:
        return earlier
    try:
        return await _create(services, spec)
    except UserError as error:
        raise in_words_of_client(error, spec.calls) from error


async def _create(services: Services, spec: JobSpec) -> Job:
    start = find_start(services, spec)
    check_options(services, spec)
    job_id = new_id("ftjob-")
    folder = services.settings.runs_dir / job_id
    try:
        taken = await take_data(services, spec, folder)
        if (earlier := _earlier(services, spec)) is None:
            return services.jobs.submit(job_id=job_id, **job_columns(spec, start, taken))
    except (OSError, sqlite3.Error):
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
        raise
    await asyncio.to_thread(
        shutil.rmtree, folder, ignore_errors=True
    )  # the same request came twice, and was faster there
    return earlier


def check_options(services: Services, spec: JobSpec) -> None:
    """Raises UserError for what the trainer, or the end of the job, would stumble over."""
    if spec.promote == "best" and spec.validation is None and spec.options.validation_split == 0:
        mend = "give validation, or validation_split above 0, such as 0.1"
        raise UserError(f"promote: best needs a validation loss; {mend}", param="promote")
    check_tracking(spec.options.tracking)
    if spec.webhook is not None:
        services.webhooks.check(spec.webhook)


async def take_data(services: Services, spec: JobSpec, folder: Path) -> dict[str, TakenDataset]:
    """The datasets by their names, and the held-out one; what came inline is written into `folder`."""
    taker = DatasetTaker(
        settings=services.settings,
        files=services.files,
        folder=folder,
        reading=spec.options.reading,
        pairs=spec.options.recipe == "dpo",
    )
    held_out = {} if spec.validation is None else {HELD_OUT: spec.validation}
    return await taker.take({**spec.datasets, **held_out})


def job_columns(spec: JobSpec, start: Start, taken: Mapping[str, TakenDataset]) -> dict[str, Any]:
    training = [taken[name] for name in spec.datasets]
    held_out = taken.get(HELD_OUT)
    configs = tuple(dataset.config for dataset in training)
    files = tuple(file for config in configs for file in config.data_files or ())
    file_ids = tuple(dataset.file_id for dataset in taken.values() if dataset.file_id is not None)
    return {
        "status": "queued" if all(dataset.is_checked for dataset in taken.values()) else "validating_files",
        "model": start.base,
        "options": spec.options,
        "data_files": files,
        "datasets": () if configs == (DatasetConfig(data_files=files),) else configs,
        "validation": None if held_out is None else held_out.config,
        "start_from": None if start.entry is None else start.entry.id,
        "merge_start": spec.merge_start,
        "file_id": training[0].file_id,
        "validation_file_id": None if held_out is None else held_out.file_id,
        "file_ids": file_ids,
        "suffix": spec.suffix,
        "promote": spec.promote,
        "priority": spec.priority,
        "metadata": dict(spec.metadata),
        "webhook": spec.webhook,
        "notes": spec.notes,
        "idempotency_key": spec.idempotency_key,
        "request_hash": spec.request_hash,
    }


def _earlier(services: Services, spec: JobSpec) -> Job | None:
    """The job that the same request made before. Raises ApiError 409 where it was another request."""
    key = spec.idempotency_key
    job = None if key is None else services.store.with_key(key)
    if job is not None and job.request_hash != spec.request_hash:
        message = f"Idempotency-Key: {key!r:.80} came with another request, which made {job.id}; send a new key"
        raise conflict(message, param="Idempotency-Key")
    return job


def find_start(services: Services, spec: JobSpec) -> Start:
    """The base model and the checkpoint that the job begins with.

    Raises NotFoundError, and UserError for a model that cannot be trained, or not in this way.
    """
    start = _start_of(services.registry, spec.model)
    _check_trainable(services, start)
    is_adapter = start.entry is not None and start.entry.kind == "adapter"
    if spec.merge_start and not is_adapter:
        reason = f"{spec.model} is no adapter, so there is nothing to merge; remove it"
        raise UserError(f"merge_start: {reason}", param="merge_start")
    if spec.merge_start and not spec.options.trains_adapter:
        message = "merge_start: where every weight is trained, an adapter is always merged first; remove it"
        raise UserError(message, param="merge_start")
    return start


def _start_of(registry: Registry, name: str) -> Start:
    if not name.startswith("ft:"):
        registry.base_folder(name)  # which says how to get one that is not there
        return Start(base=name, entry=None)
    entry = registry.get(name)
    return Start(base=entry.base, entry=entry)


def _check_trainable(services: Services, start: Start) -> None:
    folder = services.registry.base_folder(start.base)
    try:
        load_config(folder)
    except UserError as error:
        message = str(error).replace(str(folder), start.base)
        raise UserError(f"model: {start.base} cannot be trained: {message}", param="model") from error


def in_words_of_client(error: UserError, calls: Mapping[str, str]) -> UserError:
    """`error`, about the field as the client calls it."""
    param = error.param or ""
    ours = max((name for name in calls if param == name or param.startswith(f"{name}.")), key=len, default=None)
    if ours is None:
        return error
    message = str(error)
    told = calls[ours] + message.removeprefix(ours) if message.startswith(ours) else message
    return type(error)(told, param=calls[ours] + param.removeprefix(ours))

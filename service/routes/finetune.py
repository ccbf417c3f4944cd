"""/finetune: jobs in, and everything there is to know about them out."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncGenerator, Iterable
from typing import Annotated

import msgspec
from fastapi import APIRouter, Body, Header, Path, Query
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from lm.config import load_config
from lm.errors import NotFoundError, UserError
from service.datasets import discard_dataset, take_dataset
from service.finetune_config import in_config, take_config
from service.jobs.job import Job, new_id
from service.jobs.policy import queue_position
from service.jobs.store import JobEvent, JobStore
from service.schemas.finetune import (
    AnyFinetuneRequest,
    DatasetRequest,
    EventList,
    FinetuneRequest,
    JobAnswer,
    JobList,
    MetricsAnswer,
    TorchtuneRequest,
    job_answer,
)
from service.services import Services, ServicesDep
from service.sse import EventStream
from trainer.config import TrainingOptions

router = APIRouter(prefix="/finetune", tags=["Fine-tuning"])

HEARTBEAT_S = 15.0
EVENT_BATCH = 1000

JobId = Annotated[str, Path(description="`ftjob-...`")]
EventId = Annotated[int, Query(ge=0, le=2**53)]


@router.post("", status_code=202)
async def create_job(request: Annotated[AnyFinetuneRequest, Body()], services: ServicesDep) -> JobAnswer:
    """Start fine-tuning. Only `model` and `dataset` are required, or only `config`: torchtune's configuration, as an
    object or as the text of its YAML file. Watch GET /finetune/{id}."""
    services.admission.refuse_while_draining()
    if isinstance(request, FinetuneRequest):
        _check_model(services, request.model)
        return await _submit(services, request, request.model, request.options(), request.dataset)
    taken = await asyncio.to_thread(take_config, request, services.registry)
    _check_model(services, taken.model)
    try:
        return await _submit(services, request, taken.model, taken.options, taken.dataset, notes=taken.notes)
    except NotFoundError:
        raise
    except UserError as error:
        raise (error if request.dataset is not None else in_config(error)) from error


async def _submit(
    services: Services,
    request: FinetuneRequest | TorchtuneRequest,
    model: str,
    options: TrainingOptions,
    dataset: DatasetRequest,
    *,
    notes: tuple[str, ...] = (),
) -> JobAnswer:
    job_id = new_id("ftjob-")
    try:
        data = await take_dataset(
            dataset, job_id=job_id, settings=services.settings, files=services.files, reading=options.reading
        )
        job = services.jobs.submit(
            job_id=job_id,
            status="queued" if data.is_checked else "validating_files",
            model=model,
            options=options,
            data_files=data.files,
            file_id=data.file_id,
            suffix=request.suffix or "",
            promote=request.promote,
            notes=notes,
        )
    except (OSError, sqlite3.OperationalError):
        discard_dataset(job_id, services.settings)
        raise
    return _answers(services, [job])[0]


@router.get("")
async def list_jobs(
    services: ServicesDep, limit: Annotated[int, Query(ge=1, le=100)] = 20, after: str | None = None
) -> JobList:
    """Newest first. `after` is the id of the last job of the page before."""
    jobs, has_more = services.store.page(limit=limit, after=after)
    return JobList(data=_answers(services, jobs), has_more=has_more)


@router.get("/{job_id}")
async def get_job(job_id: JobId, services: ServicesDep) -> JobAnswer:
    return _answers(services, [services.store.get(job_id)])[0]


@router.post("/{job_id}/cancel")
async def cancel_job(job_id: JobId, services: ServicesDep) -> JobAnswer:
    """A running job ends within a step or so, and is `cancelled` then. 409 for a job that is over."""
    return _answers(services, [services.jobs.cancel(job_id)])[0]


@router.get(
    "/{job_id}/events",
    response_model=EventList,
    responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
)
async def job_events(
    job_id: JobId,
    request: Request,
    services: ServicesDep,
    after: EventId = 0,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
    stream: bool | None = None,
    last_event_id: Annotated[int | None, Header(ge=0, le=2**53)] = None,
) -> Response | EventList:
    """What happened, oldest first: as JSON, or with `stream=true` (or `Accept: text/event-stream`) as it happens.

    The stream begins behind `after` or `Last-Event-ID` and ends after `succeeded`, `failed` or `cancelled`.
    """
    services.store.get(job_id)
    if stream or (stream is None and "text/event-stream" in request.headers.get("accept", "")):
        first = max(after, last_event_id or 0)
        return EventStream(b": events of a job\n\n", follow(services.store, job_id, after=first))
    events = services.store.events(job_id, after=after, limit=limit + 1)
    return EventList(data=events[:limit], has_more=len(events) > limit)


@router.get("/{job_id}/metrics")
async def job_metrics(job_id: JobId, services: ServicesDep) -> MetricsAnswer:
    """The figures of every step, and the validation losses."""
    services.store.get(job_id)
    events = services.store.events(job_id, types=("step", "validation"))
    return MetricsAnswer(
        steps=[event for event in events if event["type"] == "step"],
        validation=[event for event in events if event["type"] == "validation"],
    )


@router.get("/{job_id}/logs", response_class=PlainTextResponse)
async def job_logs(
    job_id: JobId, services: ServicesDep, lines: Annotated[int, Query(ge=1, le=10_000)] = 200
) -> PlainTextResponse:
    """The last lines that the trainer printed."""
    run = services.jobs.run_folder(services.store.get(job_id))
    return PlainTextResponse(await asyncio.to_thread(run.log_tail, lines, lines * 256))


async def follow(store: JobStore, job_id: str, *, after: int) -> AsyncGenerator[bytes]:
    """The events of a job as server-sent events, until its last one, or until the service stops.

    Comments keep a silent connection alive.
    """
    while True:
        changed = store.changed(job_id)  # before reading: what comes in between sets it
        events = store.events(job_id, after=after, limit=EVENT_BATCH)
        for event in events:
            yield _sse(event)
            after = event["id"]
        if events:
            continue
        if store.get(job_id).finished or store.is_closing:
            return
        try:
            async with asyncio.timeout(HEARTBEAT_S):
                await changed.wait()
        except TimeoutError:
            yield b": still here\n\n"


def _sse(event: JobEvent) -> bytes:
    return b"id: %d\nevent: %s\ndata: %s\n\n" % (event["id"], event["type"].encode(), msgspec.json.encode(event))


def _check_model(services: Services, name: str) -> None:
    """Raises NotFoundError, and UserError for a base model that we cannot train."""
    folder = services.registry.base_folder(name)
    try:
        load_config(folder)
    except UserError as error:
        message = str(error).replace(str(folder), name)
        raise UserError(f"model: {name} cannot be trained: {message}", param="model") from error


def _answers(services: Services, jobs: Iterable[Job]) -> list[JobAnswer]:
    queued = services.store.with_status("queued")
    return [
        job_answer(
            job,
            checkpoints=[entry.id for entry in services.registry.of_job(job.id)],
            queue_position=queue_position(job, queued) if job.status == "queued" else None,
        )
        for job in jobs
    ]

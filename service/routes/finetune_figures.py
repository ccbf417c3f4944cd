"""/finetune/{id}/...: what happened in a job, its figures and its log."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Annotated, Literal

import msgspec
from fastapi import APIRouter, Header, Query
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from service.curve import loss_curve
from service.figures import as_csv, newest_figures
from service.jobs.store import JobEvent, JobStore
from service.routes.finetune import JobId
from service.schemas.finetune_answers import EventList, MetricsAnswer
from service.services import ServicesDep
from service.sse import EventStream

router = APIRouter(prefix="/finetune", tags=["Fine-tuning"])

HEARTBEAT_S = 15.0
EVENT_BATCH = 1000

EventId = Annotated[int, Query(ge=0, le=2**53)]


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


@router.get(
    "/{job_id}/metrics",
    response_model=MetricsAnswer,
    responses={200: {"content": {"text/csv": {"schema": {"type": "string"}}}}},
)
async def job_metrics(
    job_id: JobId, request: Request, services: ServicesDep, format: Literal["json", "csv"] | None = None
) -> Response:
    """The figures of every step, and those of the held-out records: as JSON, or with `format=csv` (or `Accept: text/csv`)
    as a table of one line a step."""
    services.store.get(job_id)
    events = await all_events(services.store, job_id, "step", "validation", "samples", "resumed")
    if format == "csv" or (format is None and "text/csv" in request.headers.get("accept", "")):
        return PlainTextResponse(await asyncio.to_thread(lambda: as_csv(newest_figures(events))), media_type="text/csv")
    return Response(await asyncio.to_thread(_as_json, events), media_type="application/json")


def _as_json(events: list[JobEvent]) -> str:
    figures = newest_figures(events)
    answer = MetricsAnswer(steps=figures["step"], validation=figures["validation"], samples=figures["samples"])
    return answer.model_dump_json()


@router.get(
    "/{job_id}/curve.svg",
    response_class=Response,
    responses={200: {"content": {"image/svg+xml": {"schema": {"type": "string"}}}}},
)
async def job_curve(job_id: JobId, services: ServicesDep) -> Response:
    """The losses so far as a picture."""
    job = services.store.get(job_id)
    events = await all_events(services.store, job_id, "step", "validation", "resumed")
    title = f"{job.id}, {job.options.recipe} of {job.model}"
    picture = await asyncio.to_thread(loss_curve, events, title=title)
    headers = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}
    return Response(picture, media_type="image/svg+xml", headers=headers)


@router.get("/{job_id}/logs", response_class=PlainTextResponse)
async def job_logs(
    job_id: JobId, services: ServicesDep, lines: Annotated[int, Query(ge=1, le=10_000)] = 200
) -> PlainTextResponse:
    """The last lines that the trainer printed."""
    run = services.jobs.run_folder(services.store.get(job_id))
    return PlainTextResponse(await asyncio.to_thread(run.log_tail, lines, lines * 256))


async def all_events(store: JobStore, job_id: str, *types: str) -> list[JobEvent]:
    """All of these types. There may be 100,000, which would hold everybody up: others go on between two batches."""
    events: list[JobEvent] = []
    while batch := store.events(job_id, after=events[-1]["id"] if events else 0, limit=EVENT_BATCH, types=types):
        events += batch
        await asyncio.sleep(0)
    return events


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

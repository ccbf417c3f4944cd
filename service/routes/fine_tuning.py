"""/v1/fine_tuning/jobs, as OpenAI's clients use it. These are the jobs of /finetune, told in OpenAI's words."""

from __future__ import annotations

import hashlib
import secrets
from typing import Annotated

from fastapi import APIRouter, Query
from starlette.requests import Request

from lm.errors import NotFoundError, UserError
from service.finetuning import JobSpec, create_job
from service.jobs.job import Job
from service.routes.finetune import IdempotencyKey, JobId
from service.schemas.datasets import DatasetRequest
from service.schemas.fine_tuning import MAX_SEED, FineTuningRequest
from service.schemas.fine_tuning_answers import (
    FIELDS,
    FineTuningCheckpointList,
    FineTuningJob,
    FineTuningJobList,
    checkpoint_id,
    fine_tuning_checkpoint,
    fine_tuning_job,
)
from service.schemas.fine_tuning_events import FineTuningEventList, event_prefix, fine_tuning_event
from service.services import Services, ServicesDep

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["OpenAI"])

Limit = Annotated[int, Query(ge=1, le=100)]
After = Annotated[str | None, Query(description="The id of the last one of the page before.")]
METADATA_PARAMETER = {
    "name": "metadata",
    "in": "query",
    "description": "`metadata[key]=value`: only jobs with all of these. `metadata=null`: only those without any.",
    "style": "deepObject",
    "explode": True,
    "schema": {"type": "object", "additionalProperties": {"type": "string"}},
}


@router.post("")
async def create_fine_tuning_job(
    body: FineTuningRequest, services: ServicesDep, idempotency_key: IdempotencyKey = None
) -> FineTuningJob:
    """Start fine-tuning. Watch GET /v1/fine_tuning/jobs/{id}, or its events."""
    services.admission.refuse_while_draining()
    return _answer(services, await create_job(services, _spec(body, idempotency_key)))


def _spec(body: FineTuningRequest, key: str | None) -> JobSpec:
    held_out = None if body.validation_file is None else DatasetRequest(file_id=body.validation_file)
    return JobSpec(
        model=body.model,
        options=body.options(seed=secrets.randbelow(MAX_SEED + 1)),
        datasets={"dataset": DatasetRequest(file_id=body.training_file)},
        validation=held_out,
        suffix=body.suffix or "",
        metadata=body.metadata or {},
        idempotency_key=key,
        request_hash=None if key is None else hashlib.sha256(body.model_dump_json().encode()).hexdigest(),
        calls=FIELDS,
    )


@router.get("", openapi_extra={"parameters": [METADATA_PARAMETER]})
async def list_fine_tuning_jobs(
    request: Request, services: ServicesDep, limit: Limit = 20, after: After = None
) -> FineTuningJobList:
    """Newest first, those of POST /finetune included."""
    jobs, has_more = services.store.page(limit=limit, after=after, metadata=_metadata_filter(request))
    return FineTuningJobList(data=[_answer(services, job) for job in jobs], has_more=has_more)


def _metadata_filter(request: Request) -> dict[str, str] | None:
    """None: all jobs. Empty: those without metadata."""
    wanted = {
        name.removeprefix("metadata[").removesuffix("]"): value
        for name, value in request.query_params.multi_items()
        if name.startswith("metadata[") and name.endswith("]")
    }
    plain = request.query_params.get("metadata")
    if plain not in (None, "null") or (plain is not None and wanted):
        raise UserError(
            f"metadata: write metadata[key]=value, or metadata=null alone (got {plain!r:.80})", param="metadata"
        )
    if len(wanted) > 16:
        raise UserError(f"metadata: a job has at most 16 pairs, not {len(wanted)}", param="metadata")
    return {} if plain == "null" else wanted or None


@router.get("/{job_id}")
async def get_fine_tuning_job(job_id: JobId, services: ServicesDep) -> FineTuningJob:
    return _answer(services, services.store.get(job_id))


@router.post("/{job_id}/cancel")
async def cancel_fine_tuning_job(job_id: JobId, services: ServicesDep) -> FineTuningJob:
    """A running job ends within a step or so, and is `cancelled` then. 409 for a job that is over."""
    return _answer(services, services.jobs.cancel(job_id))


@router.post("/{job_id}/pause")
async def pause_fine_tuning_job(job_id: JobId, services: ServicesDep) -> FineTuningJob:
    """A running job saves its state and gives its device free, within a step or so, and is `queued` then, until it is
    resumed. 409 for a job that is over."""
    return _answer(services, services.jobs.pause(job_id))


@router.post("/{job_id}/resume")
async def resume_fine_tuning_job(job_id: JobId, services: ServicesDep) -> FineTuningJob:
    """A paused or failed job goes on from its newest state. 409 for one that succeeded or was cancelled."""
    return _answer(services, services.jobs.resume(job_id))


@router.get("/{job_id}/events")
async def list_fine_tuning_events(
    job_id: JobId, services: ServicesDep, limit: Limit = 20, after: After = None
) -> FineTuningEventList:
    """Newest first."""
    job = services.store.get(job_id)
    before = None if after is None else _number(job, after)
    events = services.store.newest_events(job_id, before=before, limit=limit + 1)
    return FineTuningEventList(
        data=[fine_tuning_event(job, event) for event in events[:limit]], has_more=len(events) > limit
    )


def _number(job: Job, event_id: str) -> int:
    number = event_id.removeprefix(event_prefix(job))
    if number == event_id or not (number.isascii() and number.isdigit() and len(number) < 16):
        raise NotFoundError(f"after: the job {job.id} has no event {event_id!r:.80}", param="after")
    return int(number)


@router.get("/{job_id}/checkpoints")
async def list_fine_tuning_checkpoints(
    job_id: JobId, services: ServicesDep, limit: Limit = 10, after: After = None
) -> FineTuningCheckpointList:
    """Those that are there, newest first."""
    job = services.store.get(job_id)
    entries = sorted(services.registry.of_job(job.id), key=lambda entry: -(entry.step or 0))
    ids = [checkpoint_id(entry) for entry in entries]
    if after is not None and after not in ids:
        raise NotFoundError(f"after: the job {job.id} has no checkpoint {after!r:.80}", param="after")
    first = 0 if after is None else ids.index(after) + 1
    page = [fine_tuning_checkpoint(entry) for entry in entries[first : first + limit]]
    return FineTuningCheckpointList(
        data=page,
        first_id=page[0].id if page else None,
        last_id=page[-1].id if page else None,
        has_more=first + limit < len(entries),
    )


def _answer(services: Services, job: Job) -> FineTuningJob:
    return fine_tuning_job(job, organization=services.settings.organization)

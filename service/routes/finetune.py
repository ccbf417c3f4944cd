"""/finetune: jobs in, and what becomes of them."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterable
from typing import Annotated, Any

from fastapi import APIRouter, Body, Header, Path, Query
from starlette.responses import Response

from lm.errors import NotFoundError, UserError
from service.dry_run import dry_run
from service.finetune_config import in_config, take_config
from service.finetuning import JobSpec, create_job
from service.jobs.job import Job
from service.jobs.policy import queue_position
from service.schemas.dry_run import DryRunAnswer
from service.schemas.finetune import AnyFinetuneRequest, FinetuneRequest, JobOptions, TorchtuneRequest
from service.schemas.finetune_answers import JobAnswer, JobDeleted, JobList, job_answer
from service.services import Services, ServicesDep

router = APIRouter(prefix="/finetune", tags=["Fine-tuning"])

JobId = Annotated[str, Path(description="`ftjob-...`")]
IdempotencyKey = Annotated[str | None, Header(min_length=1, max_length=255)]


@router.post("", status_code=202, response_model=JobAnswer, responses={200: {"model": DryRunAnswer}})
async def create(
    request: Annotated[AnyFinetuneRequest, Body()], services: ServicesDep, idempotency_key: IdempotencyKey = None
) -> JobAnswer | Response:
    """Start fine-tuning. Only `model` and `dataset` are required, or only `config`: torchtune's configuration, as an
    object or as the text of its YAML file. Watch GET /finetune/{id}.

    With an `Idempotency-Key` the same request may be sent again: it makes one job. With `dry_run` nothing is trained: the
    answer, with status 200, says what the job would be like.
    """
    services.admission.refuse_while_draining()
    if isinstance(request, FinetuneRequest):
        return await _answer(services, _spec(request, idempotency_key), request)
    spec = await asyncio.to_thread(_config_spec, request, services, idempotency_key)
    try:
        return await _answer(services, spec, request)
    except NotFoundError:
        raise
    except UserError as error:
        raise (error if request.dataset is not None else in_config(error)) from error


async def _answer(services: Services, spec: JobSpec, request: JobOptions) -> JobAnswer | Response:
    if request.dry_run:
        answer = await dry_run(services, spec)
        return Response(answer.model_dump_json(), media_type="application/json")
    return job_answers(services, [await create_job(services, spec)])[0]


def _spec(request: FinetuneRequest, key: str | None) -> JobSpec:
    return JobSpec(
        model=request.model,
        options=request.options(),
        datasets=request.datasets(),
        **_besides(request, key),
    )


def _config_spec(request: TorchtuneRequest, services: Services, key: str | None) -> JobSpec:
    taken = take_config(request, services.registry)
    return JobSpec(
        model=taken.model,
        options=taken.options,
        datasets=taken.datasets,
        notes=taken.notes,
        **_besides(request, key) | {"validation": taken.validation},
    )


def _besides(request: JobOptions, key: str | None) -> dict[str, Any]:
    """What a request says about a job besides its training."""
    return {
        "validation": request.validation,
        "suffix": request.suffix or "",
        "promote": request.promote,
        "merge_start": request.merge_start,
        "priority": request.priority,
        "metadata": request.metadata or {},
        "webhook": None if request.webhook is None else request.webhook.url,
        "idempotency_key": key,
        "request_hash": None if key is None else hashlib.sha256(request.model_dump_json().encode()).hexdigest(),
    }


@router.get("")
async def list_jobs(
    services: ServicesDep, limit: Annotated[int, Query(ge=1, le=100)] = 20, after: str | None = None
) -> JobList:
    """Newest first. `after` is the id of the last job of the page before."""
    jobs, has_more = services.store.page(limit=limit, after=after)
    return JobList(data=job_answers(services, jobs), has_more=has_more)


@router.get("/{job_id}")
async def get_job(job_id: JobId, services: ServicesDep) -> JobAnswer:
    return job_answers(services, [services.store.get(job_id)])[0]


@router.post("/{job_id}/cancel")
async def cancel_job(job_id: JobId, services: ServicesDep) -> JobAnswer:
    """A running job ends within a step or so, and is `cancelled` then. 409 for a job that is over."""
    return job_answers(services, [services.jobs.cancel(job_id)])[0]


@router.post("/{job_id}/pause")
async def pause_job(job_id: JobId, services: ServicesDep) -> JobAnswer:
    """A running job saves its state and gives its device free, within a step or so; it is `queued` and `paused` then. A
    waiting one is not started before it is resumed. 409 for a job that is over."""
    return job_answers(services, [services.jobs.pause(job_id)])[0]


@router.post("/{job_id}/resume")
async def resume_job(job_id: JobId, services: ServicesDep) -> JobAnswer:
    """A paused or failed job goes on from its newest state, as if nothing had happened. 409 for one that succeeded or was
    cancelled."""
    return job_answers(services, [services.jobs.resume(job_id)])[0]


@router.delete("/{job_id}")
async def delete_job(job_id: JobId, services: ServicesDep) -> JobDeleted:
    """Remove a job with all its files and checkpoints. 409 while it is not over, and while one of its checkpoints is
    served or in use."""
    job = services.store.get(job_id)
    await services.jobs.delete(job_id)
    services.files.discard(job.result_files)
    return JobDeleted(id=job_id)


def job_answers(services: Services, jobs: Iterable[Job]) -> list[JobAnswer]:
    queued = services.store.queue()
    return [
        job_answer(
            job,
            checkpoints=[entry.id for entry in services.registry.of_job(job.id)],
            queue_position=queue_position(job, queued) if job.status == "queued" else None,
        )
        for job in jobs
    ]

"""/checkpoints: what can be served, what is, and how to change it by hand."""

from __future__ import annotations

from fastapi import APIRouter

from service.errors import ApiError, conflict, unavailable
from service.registry import Entry
from service.schemas.checkpoints import CheckpointAnswer, CheckpointList
from service.services import Services, ServicesDep
from service.serving import NoEngineError, SwapError

router = APIRouter(prefix="/checkpoints", tags=["Checkpoints"])


@router.get("")
async def list_checkpoints(services: ServicesDep) -> CheckpointList:
    """Everything that was registered, newest first; what is served, since when, and what could not be loaded."""
    serving = services.serving
    return CheckpointList(
        data=[checkpoint_answer(services, entry) for entry in reversed(services.registry.entries())],
        served=None if serving.served is None else serving.served.id,
        served_since=None if serving.since is None else int(serving.since),
        problems=serving.problems,
    )


@router.post("/rollback")
async def rollback(services: ServicesDep) -> CheckpointAnswer:
    """Take back the last promotion: what was served before answers again. 409 when there is none."""
    try:
        return checkpoint_answer(services, await services.serving.rollback())
    except SwapError as error:
        raise _refusal(services, "the previous checkpoint", error) from error


@router.post("/{checkpoint_id:path}/activate")
async def activate(checkpoint_id: str, services: ServicesDep) -> CheckpointAnswer:
    """Serve this one from now on. Returns when it answers; until then the old one does."""
    try:
        return checkpoint_answer(services, await services.serving.promote(checkpoint_id, "activate"))
    except SwapError as error:
        raise _refusal(services, checkpoint_id, error) from error


def _refusal(services: Services, wanted: str, error: SwapError) -> ApiError:
    if isinstance(error, NoEngineError):
        return unavailable(f"{wanted} could not be loaded: {error}", retry_after=5)
    served = services.serving.served
    return conflict(f"{wanted} could not be loaded: {error}; {served.id if served else 'nothing'} is still served")


def checkpoint_answer(services: Services, entry: Entry) -> CheckpointAnswer:
    served = services.serving.served
    return CheckpointAnswer(
        id=entry.id,
        kind=entry.kind,
        base=entry.base,
        path=services.registry.path_in_home(entry),
        job_id=entry.job_id,
        step=entry.step,
        created_at=int(entry.created_at),
        train_loss=entry.train_loss,
        validation_loss=entry.validation_loss,
        servable=entry.base == services.serving.base,
        loaded=entry.id in services.serving.loaded,
        served=served is not None and served.id == entry.id,
    )

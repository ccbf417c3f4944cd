"""GET /v1/models and /v1/models/{id}: what a request may name."""

from __future__ import annotations

from fastapi import APIRouter

from lm.errors import NotFoundError
from service.registry import Entry
from service.schemas.answers import Model, ModelList
from service.services import Services, ServicesDep
from service.serving import LATEST

router = APIRouter(tags=["OpenAI"])


@router.get("/v1/models")
async def list_models(services: ServicesDep) -> ModelList:
    """The served model first, then the others, newest first."""
    entries = sorted(services.serving.servable(), key=lambda entry: (entry == services.serving.served, entry.seq))
    return ModelList(data=[_model(services, entry) for entry in reversed(entries)])


@router.get("/v1/models/{model:path}")
async def get_model(model: str, services: ServicesDep) -> Model:
    """One model. `latest` and the aliases of the settings are what is served."""
    served = services.serving.served
    if served is not None and model in (LATEST, *services.settings.served_model_aliases):
        return _model(services, served)
    for entry in services.serving.servable():
        if entry.id == model:
            return _model(services, entry)
    raise NotFoundError(f"model: there is no model {model!r:.120}; GET /v1/models lists them", param="model")


def _model(services: Services, entry: Entry) -> Model:
    ready = services.engine.ready
    return Model(
        id=entry.id,
        created=int(entry.created_at),
        owned_by="tuneserve",
        root=entry.base,
        parent=None if entry.kind == "base" else entry.base,
        max_model_len=None if ready is None else ready.max_model_len,
    )

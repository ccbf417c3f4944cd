"""GET /v1/models and /v1/models/{id}: what a request may name. POST /models: add one that lies in models/."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Response

from lm.errors import NotFoundError, UserError
from service.errors import conflict
from service.model_facts import MODEL_NAME, ModelFacts, check_folder_in
from service.registry import Entry, NameTakenError
from service.schemas.answers import Model, ModelDeleted, ModelList
from service.schemas.models import MAX_NAME, BaseModelAnswer, ModelRequest
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
    if served is not None and model in _names_of_served(services):
        return _model(services, served)
    return _model(services, _find(services, model))


@router.delete("/v1/models/{model:path}")
async def delete_model(model: str, services: ServicesDep) -> ModelDeleted:
    """Remove a fine-tuned model, `ft:...`, with its files. 409 while it is served or in use, and for a base model."""
    if model in _names_of_served(services):
        raise conflict(f"model: {model!r} means what is served; name the model itself", param="model")
    return ModelDeleted(id=(await services.jobs.delete_checkpoint(model)).id)


def check_model(services: Services, model: str | None) -> None:
    """Raises NotFoundError for a `model` that no request may name. Needs no engine."""
    if model is not None and model not in _names_of_served(services) and not services.settings.allow_unknown_model:
        _find(services, model)


def _find(services: Services, model: str) -> Entry:
    for entry in services.serving.servable():
        if entry.id == model:
            return entry
    raise NotFoundError(f"model: there is no model {model!r:.120}; GET /v1/models lists them", param="model")


def _names_of_served(services: Services) -> tuple[str, ...]:
    return (LATEST, *services.settings.served_model_aliases)


@router.post("/models", status_code=201, responses={200: {"model": BaseModelAnswer}}, tags=["Checkpoints"])
async def add_model(body: ModelRequest, services: ServicesDep, response: Response) -> BaseModelAnswer:
    """Check a model that was put into models/ and give it a name, which outlives a restart.

    200 where it has that name already: folders directly in models/ have their own name. 404: no such folder. 409: the
    name is taken.
    """
    folder, facts = await asyncio.to_thread(check_folder_in, services.settings.models_dir, body.path)
    name = folder.name if body.name is None else body.name
    _check_name(services, name)
    try:
        entry, is_new = services.registry.add_base(name, folder)
    except NameTakenError as error:
        raise conflict(str(error), param="name") from error
    response.status_code = 201 if is_new else 200
    return _base_answer(services, entry, facts)


def _check_name(services: Services, name: str) -> None:
    if not MODEL_NAME.fullmatch(name) or len(name) > MAX_NAME:
        raise UserError(
            f"name: {name!r:.120} cannot stand in a model id; give one of letters, digits, `.`, `_` and `-`, "
            f"at most {MAX_NAME}",
            param="name",
        )
    if name in _names_of_served(services):
        raise conflict(f"name: {name!r} means what is served; choose another name", param="name")


def _base_answer(services: Services, entry: Entry, facts: ModelFacts) -> BaseModelAnswer:
    return BaseModelAnswer(
        id=entry.id,
        path=services.registry.path_in_home(entry),
        created_at=int(entry.created_at),
        family=facts.family,
        parameters=facts.num_parameters,
        context_length=facts.context_length,
        weights=facts.weights,
        tokenizer=facts.tokenizer,
        servable=entry.base == services.serving.base,
    )


def _model(services: Services, entry: Entry) -> Model:
    ready = services.engine.known
    return Model(
        id=entry.id,
        created=int(entry.created_at),
        owned_by="tuneserve",
        root=entry.base,
        parent=None if entry.kind == "base" else entry.base,
        max_model_len=None if ready is None else ready.max_model_len,
    )

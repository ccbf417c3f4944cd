"""GET /v1/models and /v1/models/{id}: what a request may name. POST /models: add one that lies in models/."""

from __future__ import annotations

import asyncio
from pathlib import Path, PurePosixPath

from fastapi import APIRouter

from lm.errors import NotFoundError, UserError
from service.errors import conflict
from service.pull_work import check_model
from service.registry import MODEL_NAME, Entry, NameTakenError
from service.schemas.answers import Model, ModelList
from service.schemas.models import ModelRequest
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


@router.post("/models", status_code=201, tags=["Checkpoints"])
async def add_model(body: ModelRequest, services: ServicesDep) -> Model:
    """Check a model that was put into models/ and give it a name, which outlives a restart.

    Folders directly in models/ have their own name as it is. 404: no such folder. 409: the name is taken.
    """
    folder = await asyncio.to_thread(_checked_folder, services.settings.models_dir, body.path)
    name = folder.name if body.name is None else body.name
    if not MODEL_NAME.fullmatch(name):
        raise UserError(
            f"name: {name!r:.120} cannot stand in a model id; give one of letters, digits, `.`, `_` and `-`",
            param="name",
        )
    if name in (LATEST, *services.settings.served_model_aliases):
        raise conflict(f"name: {name!r} means what is served; choose another name", param="name")
    try:
        return _model(services, services.registry.add_base(name, folder))
    except NameTakenError as error:
        raise conflict(str(error), param="name") from error


def _checked_folder(models: Path, written: str) -> Path:
    """The folder that a request means. Raises UserError and NotFoundError: all that is wrong with it or its files."""
    path = PurePosixPath(written)
    if path.is_absolute() or ".." in path.parts or "\0" in written or not path.parts:
        raise UserError(
            f"path: {written!r:.200} must be a folder inside models/, relative to it, without `..`", param="path"
        )
    folder = models / path
    if path.suffix.lower() == ".gguf":
        raise UserError(
            f"path: {written!r:.200} is a GGUF file, which must be converted first: run `tuneserve pull` with its path",
            param="path",
        )
    if not folder.is_dir():
        raise NotFoundError(f"path: there is no folder {written!r:.200} in models/; put the model there", param="path")
    _refuse_links_out(models, folder, written)
    try:
        check_model(folder)
    except UserError as error:
        raise UserError(f"path: {written!r:.200} is no model that can be used: {error}", param="path") from error
    return folder


def _refuse_links_out(models: Path, folder: Path, written: str) -> None:
    inside = models.resolve()
    for path in (folder, *folder.rglob("*")):
        if not path.resolve().is_relative_to(inside):
            raise UserError(
                f"path: {written!r:.200} leaves models/ by the link {path.name!r:.120}; `tuneserve pull FOLDER` copies "
                "a model with what its links mean",
                param="path",
            )


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

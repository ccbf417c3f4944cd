"""/checkpoints/{id}/...: what a checkpoint came from, and its files to take away."""

from __future__ import annotations

import asyncio
from pathlib import Path as FilePath
from typing import Annotated

from fastapi import APIRouter, Path, Query
from starlette.responses import FileResponse, StreamingResponse

from lm.errors import NotFoundError, UserError
from lm.gguf_export import GgufType
from service.errors import conflict
from service.exports import Export
from service.registry import Entry
from service.routes.checkpoints import checkpoint_answer
from service.schemas.checkpoints import CheckpointDetails, CheckpointFile, ExportAnswer
from service.services import Services, ServicesDep
from service.tar_stream import TarStream
from trainer.card import read_facts

router = APIRouter(prefix="/checkpoints", tags=["Checkpoints"])

CheckpointId = Annotated[str, Path(description="`ft:...`")]
Kind = Annotated[GgufType, Query(alias="type", description="Of the matrices.")]


@router.get("/{checkpoint_id:path}/download", response_class=StreamingResponse)
async def download(checkpoint_id: CheckpointId, services: ServicesDep) -> StreamingResponse:
    """The folder of a checkpoint as a tar archive: a model, or an adapter, as transformers and peft load it."""
    entry = _checkpoint(services, checkpoint_id)
    folder = _folder(entry)
    name = checkpoint_id.replace(":", "-")
    try:
        archive = await asyncio.to_thread(TarStream, folder, name, time=int(entry.created_at))
    except FileNotFoundError as error:
        raise _gone(entry) from error
    headers = {
        "Content-Length": str(archive.num_bytes),
        "Content-Disposition": f'attachment; filename="{name}.tar"',
    }
    return StreamingResponse(archive, media_type="application/x-tar", headers=headers)


@router.post("/{checkpoint_id:path}/export", status_code=202)
async def start_export(checkpoint_id: CheckpointId, services: ServicesDep, kind: Kind = "f16") -> ExportAnswer:
    """Write a checkpoint as a GGUF file, for llama.cpp and its relatives; an adapter is merged into its base first. It
    takes a while: ask GET .../export until it is `ready`, and get the file from .../gguf."""
    services.admission.refuse_while_draining()
    entry = _checkpoint(services, checkpoint_id)
    return _export_answer(entry, kind, services.exports.start(entry, kind))


@router.get("/{checkpoint_id:path}/export")
async def get_export(checkpoint_id: CheckpointId, services: ServicesDep, kind: Kind = "f16") -> ExportAnswer:
    entry = _checkpoint(services, checkpoint_id)
    return _export_answer(entry, kind, services.exports.find(entry, kind))


@router.get("/{checkpoint_id:path}/gguf", response_class=FileResponse)
async def get_gguf(checkpoint_id: CheckpointId, services: ServicesDep, kind: Kind = "f16") -> FileResponse:
    """The file that was exported. 409 before it is ready."""
    entry = _checkpoint(services, checkpoint_id)
    export = services.exports.find(entry, kind)
    if export.status != "ready":
        state = f"its export as {kind} has the status {export.status}"
        raise conflict(f"{entry.id}: {state}; POST /checkpoints/{{id}}/export begins one")
    name = f"{checkpoint_id.replace(':', '-')}.{kind}.gguf"
    return FileResponse(export.path, media_type="application/octet-stream", filename=name)


@router.get("/{checkpoint_id:path}")
async def get_checkpoint(checkpoint_id: CheckpointId, services: ServicesDep) -> CheckpointDetails:
    """One checkpoint with its files, and with the job, step, data, losses and base model that it came from."""
    entry = services.registry.get(checkpoint_id)
    facts, files = await asyncio.to_thread(_look, entry)
    answer = checkpoint_answer(services, entry)
    return CheckpointDetails(**answer.model_dump(), facts=facts, files=files)


def _look(entry: Entry) -> tuple[dict[str, object] | None, list[CheckpointFile]]:
    folder = _folder(entry)
    if not folder.is_dir():
        raise _gone(entry)
    paths = [path for path in sorted(folder.iterdir()) if path.is_file()]
    return read_facts(folder), [CheckpointFile(name=path.name, bytes=path.stat().st_size) for path in paths]


def _checkpoint(services: Services, checkpoint_id: str) -> Entry:
    """Raises NotFoundError, and UserError for a base model: it was not made here."""
    entry = services.registry.get(checkpoint_id)
    if entry.kind == "base":
        raise UserError(f"model: {entry.id} is a base model; only checkpoints of jobs can be had", param="model")
    return entry


def _folder(entry: Entry) -> FilePath:
    return entry.adapter_dir or entry.base_dir


def _gone(entry: Entry) -> NotFoundError:
    return NotFoundError(f"the files of {entry.id} are not there any more", param="model")


def _export_answer(entry: Entry, kind: GgufType, export: Export) -> ExportAnswer:
    return ExportAnswer(
        model=entry.id,
        type=kind,
        status=export.status,
        bytes=export.path.stat().st_size if export.status == "ready" else None,
        error=export.problem,
    )

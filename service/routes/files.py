"""/v1/files, as OpenAI's clients use it: training data is uploaded once and named by its id."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Form, Query, UploadFile
from starlette.requests import Request
from starlette.responses import FileResponse

from lm.errors import UserError
from service.errors import conflict
from service.files import FilePurpose, Purpose
from service.schemas.files import FileAnswer, FileDeleted, FileList, file_answer
from service.services import ServicesDep

router = APIRouter(prefix="/v1/files", tags=["OpenAI"])

ANCHOR, SECONDS = "expires_after[anchor]", "expires_after[seconds]"
"""How OpenAI's clients write an object into a form."""


@router.post("")
async def create_file(
    request: Request,
    file: UploadFile,
    purpose: Annotated[Purpose, Form()],
    services: ServicesDep,
    anchor: Annotated[Literal["created_at"] | None, Form(alias=ANCHOR)] = None,
    lifetime_s: Annotated[int | None, Form(alias=SECONDS, ge=3600, le=2_592_000)] = None,
) -> FileAnswer:
    """Upload a file. One with the purpose fine-tune is JSONL, a JSON list of records, CSV, Parquet or text, as its name
    or its content says, and checked to its end. With both of `expires_after` it is removed after so many seconds."""
    for name in await request.form():
        if name not in ("file", "purpose", ANCHOR, SECONDS):
            taken = f"file, purpose, {ANCHOR} and {SECONDS}"
            raise UserError(f"{name}: unknown field, only {taken} are taken", param=name)
    if (anchor is None) != (lifetime_s is None):
        raise UserError(f"expires_after: give both {ANCHOR} and {SECONDS}, or neither", param="expires_after")
    filename = (file.filename or "upload").encode("utf-8", "replace").decode()
    stored = await services.files.take(file.file, filename=filename, purpose=purpose, lifetime_s=lifetime_s)
    return file_answer(stored)


@router.get("")
async def list_files(
    services: ServicesDep,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    after: str | None = None,
    order: Literal["asc", "desc"] = "desc",
    purpose: FilePurpose | None = None,
) -> FileList:
    """By their time, newest first unless `order` says otherwise."""
    files, has_more = services.files.page(limit=limit, after=after, purpose=purpose, ascending=order == "asc")
    return FileList(
        data=[file_answer(stored) for stored in files],
        first_id=files[0].id if files else None,
        last_id=files[-1].id if files else None,
        has_more=has_more,
    )


@router.get("/{file_id}")
async def get_file(file_id: str, services: ServicesDep) -> FileAnswer:
    return file_answer(services.files.get(file_id))


@router.delete("/{file_id}")
async def delete_file(file_id: str, services: ServicesDep) -> FileDeleted:
    """409 while a job that is not over needs it."""
    stored = services.files.get(file_id)
    if (job_id := services.store.uses_file(file_id)) is not None:
        raise conflict(f"the job {job_id} still needs {file_id}; cancel it, or wait until it is over", param="file_id")
    services.files.delete(stored.id)
    return FileDeleted(id=stored.id)


@router.get("/{file_id}/content", response_class=FileResponse)
async def file_content(file_id: str, services: ServicesDep) -> FileResponse:
    """The bytes, as they were uploaded."""
    stored = services.files.get(file_id)
    path = services.files.path(stored.id)
    return FileResponse(path, media_type="application/octet-stream", filename=stored.filename)

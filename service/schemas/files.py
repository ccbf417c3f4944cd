"""Answers of /v1/files, as OpenAI's clients read them."""

from __future__ import annotations

from typing import Literal

from service.files import FilePurpose, StoredFile
from service.schemas.answers import Answer


class FileAnswer(Answer):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: FilePurpose
    status: Literal["processed"] = "processed"
    """A file that is here has been checked."""
    expires_at: int | None


class FileList(Answer):
    object: Literal["list"] = "list"
    data: list[FileAnswer]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(Answer):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


def file_answer(stored: StoredFile) -> FileAnswer:
    return FileAnswer(
        id=stored.id,
        bytes=stored.bytes,
        created_at=int(stored.created_at),
        filename=stored.filename,
        purpose=stored.purpose,
        expires_at=None if stored.expires_at is None else int(stored.expires_at),
    )

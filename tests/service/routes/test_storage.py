"""What cannot be stored is refused as a whole: a 503 for the client, and nothing left on the disk."""

from __future__ import annotations

import resource
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.api import BASE, Api

RECORDS = [{"input": f"question {number}", "output": "answer " * 20} for number in range(1000)]
JOB = {"model": BASE, "dataset": {"records": RECORDS}, "device": "cpu"}
UPLOAD = "".join(f'{{"input": "question {number}", "output": "answer"}}\n' for number in range(1000)).encode()


@contextmanager
def full_disk(home: Path) -> Iterator[None]:
    """No file of this process grows beyond 16 KiB: EFBIG, where a full disk says ENOSPC."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16 << 10, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextmanager
def locked_database(home: Path) -> Iterator[None]:
    connection = sqlite3.connect(home / "state" / "tuneserve.db", isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        connection.close()


@pytest.mark.parametrize("trouble", [full_disk, locked_database])
@pytest.mark.parametrize(
    ("path", "request_"),
    [("/finetune", {"json": JOB}), ("/v1/files", {"files": {"file": UPLOAD}, "data": {"purpose": "fine-tune"}})],
)
def test_what_cannot_be_stored_is_a_503_and_leaves_nothing(
    own_api: Api, trouble: Any, path: str, request_: dict[str, Any]
) -> None:
    home = own_api.services.settings.home
    with trouble(home):
        refused = own_api.post(path, **request_)
    assert_refused(refused)
    assert [*home.glob("runs/*"), *home.glob("files/*")] == []
    assert own_api.get("/finetune").json()["data"] == own_api.get("/v1/files").json()["data"] == []
    assert own_api.post(path, **request_).is_success


def assert_refused(answer: httpx.Response) -> None:
    assert answer.status_code == 503, answer.text
    assert "cannot store" in answer.json()["error"]["message"]
    assert "Retry-After" in answer.headers

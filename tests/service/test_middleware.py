from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request, UploadFile

from service.errors import install_error_handlers
from service.middleware import BodyLimit, RequestId


@pytest.fixture
def app() -> FastAPI:
    app = FastAPI()
    install_error_handlers(app)
    app.add_middleware(BodyLimit, limit=100, larger={"/file": 1000}, stalled_s=0.1)
    app.add_middleware(RequestId)

    @app.post("/json")
    async def take_json(body: dict[str, Any], request: Request) -> str:
        return str(request.state.request_id)

    @app.post("/file")
    async def take_file(file: UploadFile) -> int:
        return len(await file.read())

    @app.post("/slow")
    async def answer_slowly(body: dict[str, Any], request: Request) -> str:
        gone = asyncio.ensure_future(request.receive())
        await asyncio.sleep(0.3)
        return "gone" if gone.done() else "still there"

    return app


def post(app: FastAPI, path: str, **options: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post(path, **options)

    return asyncio.run(send())


async def in_chunks(data: bytes) -> AsyncIterator[bytes]:
    """A body that does not announce its length."""
    for start in range(0, len(data), 40):
        yield data[start : start + 40]


def json_of_size(size: int) -> bytes:
    return b'{"a": "' + b"x" * (size - 9) + b'"}'


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_up_to_the_limit_passes_and_a_larger_one_is_a_413(app: FastAPI, announced: bool) -> None:
    def send(size: int) -> httpx.Response:
        data = json_of_size(size)
        content = data if announced else in_chunks(data)
        return post(app, "/json", content=content, headers={"content-type": "application/json"})

    assert send(100).status_code == 200
    answer = send(101)
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "body_too_large"
    assert "100 bytes" in answer.json()["error"]["message"]
    assert answer.headers["X-Request-Id"]


def test_an_upload_has_a_limit_of_its_own(app: FastAPI) -> None:
    assert post(app, "/file", files={"file": b"x" * 500}).json() == 500
    assert post(app, "/file", files={"file": b"x" * 1000}).status_code == 413


def test_a_body_that_stops_in_the_middle_is_a_408(app: FastAPI) -> None:
    async def stalling() -> AsyncIterator[bytes]:
        yield b'{"a": '
        await asyncio.sleep(5)

    answer = post(app, "/json", content=stalling(), headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (408, "body_timeout")
    assert answer.headers["X-Request-Id"]


def test_an_answer_may_take_longer_than_a_body(app: FastAPI) -> None:
    assert post(app, "/slow", json={}).json() == "still there"


def test_a_plain_request_id_is_kept(app: FastAPI) -> None:
    answer = post(app, "/json", json={}, headers={"X-Request-Id": "job-7.a_b"})
    assert answer.json() == answer.headers["X-Request-Id"] == "job-7.a_b"


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, 'a"\\'])
def test_any_other_request_id_is_replaced(app: FastAPI, given: str) -> None:
    answer = post(app, "/json", json={}, headers={"X-Request-Id": given})
    assert len(answer.headers["X-Request-Id"]) == 32
    assert answer.json() == answer.headers["X-Request-Id"] != given

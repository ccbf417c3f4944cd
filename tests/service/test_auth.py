from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.auth import OPEN_PATHS
from service.settings import load_settings
from tests.support.api import Api, running_api

KEY = "sk-first"
KEYS = [KEY, "sk-second"]
GOOD = [
    {"Authorization": f"Bearer {KEY}"},
    {"Authorization": "bearer   sk-second "},
    {"X-Api-Key": KEY},
    {"X-Api-Key": KEY, "Authorization": "Bearer wrong"},
    {"X-Api-Key": "wrong", "Authorization": f"Bearer {KEY}"},
]
BAD = [
    {},
    {"Authorization": "Bearer "},
    {"Authorization": "Bearer"},
    {"Authorization": KEY},
    {"Authorization": f"Basic {KEY}"},
    {"Authorization": f"Bearer {KEY}x"},
    {"Authorization": f"Bearer {KEY[:-1]}"},
    {"Authorization": f"Bearer {KEY} {KEY}"},
    {"Authorization": f"Bearer {','.join(KEYS)}"},
    {"X-Api-Key": ""},
    {"X-Api-Key": f"Bearer {KEY}"},
    {"Authorization": b"Bearer \xff\xfe"},
    {"Cookie": f"api_key={KEY}"},
]


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with running_api(tmp_path_factory.mktemp("home"), api_keys=KEYS) as api:
        yield api


@pytest.mark.parametrize("headers", GOOD)
def test_a_known_key_opens_everything(locked: Api, headers: dict[str, str]) -> None:
    assert locked.post("/models", {}, headers=headers).status_code == 400
    assert locked.get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize("headers", BAD)
def test_anything_else_is_a_401_that_shows_no_key(locked: Api, headers: dict[str, Any]) -> None:
    answer = locked.post("/generate", {"prompt": "hi"}, headers={**headers, "X-Request-Id": "abc"})
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["code"], error["param"]) == (
        401, "authentication_error", "invalid_api_key", None,
    )  # fmt: skip
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert answer.headers["X-Request-Id"] == "abc"
    assert "Authorization: Bearer KEY" in error["message"]
    assert "sk-" not in answer.text


def test_every_route_but_the_open_ones_needs_a_key(locked: Api) -> None:
    routes = [(path, method) for path, methods in locked.app.openapi()["paths"].items() for method in methods]
    assert len(routes) > 20
    for path, method in routes:
        answer = locked.run(locked.async_client.request(method, path))
        assert (answer.status_code == 401) == (path not in OPEN_PATHS), (path, method)


def test_the_document_tells_the_ways_to_show_a_key(locked: Api) -> None:
    document = locked.get("/openapi.json").json()
    assert document["components"]["securitySchemes"].keys() == {"Bearer", "Key"}
    assert document["security"] == [{}, {"Bearer": []}, {"Key": []}]


@pytest.mark.parametrize("path", ["/nothing", "/health/", "/Health", "//health", "/metrics%2f.."])
def test_what_is_not_exactly_an_open_path_needs_a_key(locked: Api, path: str) -> None:
    assert locked.get(path).status_code == 401


@pytest.mark.parametrize("path", sorted(OPEN_PATHS))
def test_open_paths_need_no_key_and_tell_none(locked: Api, path: str) -> None:
    answer = locked.get(path)
    assert answer.status_code == 200
    assert "sk-" not in answer.text


def test_the_body_is_not_read_before_the_key_is_known(locked: Api) -> None:
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        raise AssertionError("the body was read")

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": "/v1/files", "raw_path": b"/v1/files", "query_string": b"", "root_path": "",
        "headers": [(b"content-length", b"999999999999")], "server": ("test", 80), "client": ("test", 1),
    }  # fmt: skip
    locked.run(asyncio.wait_for(locked.app(scope, receive, send), 5))  # type: ignore[arg-type]
    assert sent[0]["status"] == 401


@pytest.mark.parametrize("headers", [*GOOD, *BAD])
def test_without_keys_whatever_is_sent_is_harmless(api: Api, headers: dict[str, Any]) -> None:
    assert api.get("/v1/models", headers=headers).status_code == 200


def test_the_service_is_locked_with_the_keys_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"{KEY}\n")
    settings = load_settings(overrides={"api_key_file": str(tmp_path / "keys"), "home": str(tmp_path)})
    with running_api(tmp_path, api_keys=settings.api_keys) as api:
        assert api.get("/v1/models").status_code == 401
        assert api.get("/v1/models", headers={"X-Api-Key": KEY}).status_code == 200

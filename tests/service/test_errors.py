from __future__ import annotations

import errno
import json
import sqlite3

import pytest

from lm.errors import NotFoundError, UserError
from service.errors import ApiError, as_api_error, conflict
from tests.support.api import Api

JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("error", "status", "kind", "param", "code"),
    [(UserError("a: bad", param="a"), 400, "invalid_request_error", "a", None),
     (NotFoundError("no model", param="model"), 404, "invalid_request_error", "model", "model_not_found"),
     (NotFoundError("no file", param="file_id"), 404, "invalid_request_error", "file_id", None),
     (ApiError(503, "loading"), 503, "unavailable_error", None, None),
     (ApiError(429, "full", code="overloaded"), 429, "rate_limit_error", None, "overloaded"),
     (conflict("done already"), 409, "invalid_request_error", None, None),
     (OSError(errno.ENOSPC, "No space left", "secret"), 503, "unavailable_error", None, None),
     (OSError(errno.EROFS, "Read-only file system", "secret"), 503, "unavailable_error", None, None),
     (sqlite3.OperationalError("database is locked"), 503, "unavailable_error", None, None),
     (ChildProcessError("killed"), 503, "unavailable_error", None, None),
     (OSError(errno.EIO, "secret"), 500, "server_error", None, None),
     (RuntimeError("secret /path"), 500, "server_error", None, None)],
)  # fmt: skip
def test_an_error_has_its_status_type_param_and_code(
    error: Exception, status: int, kind: str, param: str | None, code: str | None
) -> None:
    answer = as_api_error(error)
    detail = json.loads(answer.body())["error"]
    assert answer.status_code == status
    assert detail.pop("message")
    assert detail == {"type": kind, "param": param, "code": code}
    assert "secret" not in answer.detail


def test_a_conflict_tells_the_sdk_not_to_repeat_it() -> None:
    assert conflict("done").headers == {"x-should-retry": "false"}


def test_a_message_with_half_a_character_can_be_sent() -> None:
    assert json.loads(ApiError(400, "got \ud800", param="\udfff").body())["error"]["message"] == "got \\ud800"


@pytest.mark.parametrize(
    ("method", "path", "status", "words"),
    [("GET", "/nope", 404, "no GET /nope"), ("GET", "/generate", 405, "does not take GET"),
     ("POST", "/v1/models", 405, "does not take POST"), ("GET", "/generate/", 404, "no GET /generate/")],
)  # fmt: skip
def test_a_route_that_does_not_exist_is_told_with_the_error_object(
    api: Api, method: str, path: str, status: int, words: str
) -> None:
    answer = api.run(api.async_client.request(method, path))
    assert answer.status_code == status
    assert words in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("content", "words"),
    [(b'{"prompt": "a"', "not valid JSON: Expecting"), (b"", "JSON object"), (b"[1]", "JSON object"),
     (b'"text"', "JSON object"), (b"null", "JSON object"), (b'{"prompt": "\xff"}', "not UTF-8 at byte 12"),
     (b"[" * 100_000, "within each other"), (b'{"seed": ' + b"9" * 5000 + b"}", "too many digits"),
     (b'{"prompt": "a", "temperature": NaN}', "finite number"),
     (b'{"prompt": "a", "temperature": 1e999}', "finite number"),
     (b'{"prompt": "a", "temperature": ' + b"9" * 400 + b"}", "valid number")],
)  # fmt: skip
def test_a_body_that_is_no_request_is_a_400(api: Api, content: bytes, words: str) -> None:
    answer = api.post("/generate", content=content, headers=JSON)
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]
    assert len(answer.content) < 1000


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "nonsense", ""])
def test_a_body_that_is_not_sent_as_json_is_a_400_that_says_so(api: Api, content_type: str) -> None:
    answer = api.post("/generate", content=b'{"prompt": "a"}', headers={"content-type": content_type})
    assert answer.status_code == 400
    assert "Content-Type: application/json" in answer.json()["error"]["message"]


def test_a_huge_value_is_told_in_short(api: Api) -> None:
    answer = api.post("/generate", {"prompt": ["x" * 100_000] * 20})
    assert answer.status_code == 400
    assert len(answer.content) < 1000


def test_an_empty_bearer_token_does_no_harm(api: Api) -> None:
    assert api.post("/generate", {"prompt": "a"}, headers={"Authorization": "Bearer "}).status_code == 200

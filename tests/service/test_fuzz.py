"""No input to any route of our own OpenAPI document gets a 5xx or disturbs the next request."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.app import create_app
from service.settings import Settings
from tests.support.api import Api
from tests.support.json_fuzz import any_text, junk, values

DOCUMENT = create_app(Settings()).openapi()
DEFINITIONS = DOCUMENT["components"]["schemas"]
OPERATIONS = [(method, path) for path, operations in DOCUMENT["paths"].items() for method in operations]
JSON_ROUTES = [
    (path, operations["post"]["requestBody"]["content"]["application/json"]["schema"])
    for path, operations in DOCUMENT["paths"].items()
    if "application/json" in operations.get("post", {}).get("requestBody", {}).get("content", {})
]
BODY_ROUTES = [path for path, operations in DOCUMENT["paths"].items() if "requestBody" in operations.get("post", {})]
HI = [{"role": "user", "content": "hi"}]
GOOD: dict[str, dict[str, Any]] = {
    "/generate": {"messages": HI},
    "/v1/completions": {"prompt": "hi"},
    "/v1/chat/completions": {"messages": HI},
    "/v1/responses": {"input": "hi"},
}
CONTENT_TYPES = [
    "application/json",
    "text/plain",
    "multipart/form-data; boundary=x",
    "multipart/form-data",
    "a/b; c=\xff",
]
fuzz = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None)
names = any_text.map(lambda text: quote(text, safe=":", errors="replace")).filter(lambda text: text.strip("."))


def check(api: Api, answer: httpx.Response) -> None:
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        error = answer.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["message"]
        assert len(answer.content) < 20_000
    assert not api.engine.running
    assert api.services.admission.active == 0


@pytest.mark.parametrize(("path", "schema"), JSON_ROUTES)
@fuzz
@given(data=st.data())
def test_no_json_body_breaks_the_service(
    shared_api: Api, path: str, schema: dict[str, Any], data: st.DataObject
) -> None:
    body = json.dumps(data.draw(values(schema, DEFINITIONS)))
    answer = shared_api.post(path, content=body.encode(), headers={"content-type": "application/json"})
    check(shared_api, answer)


@pytest.mark.parametrize("path", list(GOOD))
@fuzz
@given(data=st.data())
def test_no_single_field_breaks_a_good_request(shared_api: Api, path: str, data: st.DataObject) -> None:
    schema = DEFINITIONS[dict(JSON_ROUTES)[path]["$ref"].rsplit("/", 1)[1]]
    field = data.draw(st.sampled_from(sorted(schema["properties"])))
    value = data.draw(st.one_of(values(schema["properties"][field], DEFINITIONS), junk))
    body = json.dumps({**GOOD[path], field: value}).encode()
    check(shared_api, shared_api.post(path, content=body, headers={"content-type": "application/json"}))


@pytest.mark.parametrize("path", GOOD)
@fuzz
@given(data=st.data())
def test_no_combination_of_fields_breaks_a_good_request(shared_api: Api, path: str, data: st.DataObject) -> None:
    schema = DEFINITIONS[dict(JSON_ROUTES)[path]["$ref"].rsplit("/", 1)[1]]
    fields = data.draw(st.sets(st.sampled_from(sorted(schema["properties"])), min_size=2, max_size=5))
    drawn = {field: data.draw(values(schema["properties"][field], DEFINITIONS)) for field in sorted(fields)}
    body = json.dumps(GOOD[path] | drawn).encode()
    check(shared_api, shared_api.post(path, content=body, headers={"content-type": "application/json"}))


@pytest.mark.parametrize("path", BODY_ROUTES)
@fuzz
@given(content=st.binary(max_size=200), content_type=st.sampled_from(CONTENT_TYPES))
def test_no_bytes_break_the_service(shared_api: Api, path: str, content: bytes, content_type: str) -> None:
    headers = [(b"content-type", content_type.encode("latin-1"))]
    check(shared_api, shared_api.post(path, content=content, headers=headers))


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
@fuzz
@given(data=st.data())
def test_no_path_or_query_breaks_the_service(shared_api: Api, method: str, path: str, data: st.DataObject) -> None:
    parameters = DOCUMENT["paths"][path][method].get("parameters", [])
    for parameter in parameters:
        if parameter["in"] == "path":
            path = path.replace(f"{{{parameter['name']}}}", data.draw(names))
    query = {
        parameter["name"]: data.draw(values(parameter["schema"], DEFINITIONS).map(as_query))
        for parameter in parameters
        if parameter["in"] == "query" and data.draw(st.booleans())
    }
    check(shared_api, shared_api.run(shared_api.async_client.request(method, path, params=query)))


def as_query(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text.encode("utf-8", "replace").decode()


def test_after_all_that_the_service_answers(shared_api: Api) -> None:
    assert shared_api.post("/generate", {"prompt": "hi"}).json()["choices"][0]["text"] == "Hello there."

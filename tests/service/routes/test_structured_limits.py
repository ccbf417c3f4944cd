"""What a form of the answer may cost, and what of it is followed, over HTTP."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from service.engine.messages import AddRequest
from service.structured_output import json_object
from tests.support.api import Api

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
UNENFORCEABLE = {"type": "array", "uniqueItems": True}


def grammars(api: Api) -> list[str | None]:
    return [message.sampling.grammar for message in api.engine.received if isinstance(message, AddRequest)]


def form(schema: Any, **fields: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, **fields}}}


def test_every_answer_to_every_prompt_has_the_grammar(api: Api) -> None:
    body = {"prompt": ["a", "b"], "n": 2, "temperature": 1, "response_format": {"type": "json_object"}}
    assert len(api.post("/v1/completions", body).json()["choices"]) == 4
    assert grammars(api) == [json_object(param="").grammar] * 4


def test_unless_it_is_strict_a_schema_is_followed_as_far_as_it_can_be(api: Api) -> None:
    assert api.post("/v1/chat/completions", CHAT | form(UNENFORCEABLE)).status_code == 200
    assert api.post("/v1/chat/completions", CHAT | form(UNENFORCEABLE, strict=True)).status_code == 400


def test_grammars_that_kill_what_compiles_them_leave_the_service_answering(api: Api) -> None:
    rules = "\n".join(f"a{index}: a{index + 1}" for index in range(5000))
    bombs = [f'start: a0\n{rules}\na5000: "x"', 'start: %json {"type": "integer", "multipleOf": 999983}']
    for bomb in bombs:
        begin = time.perf_counter()
        answer = api.post("/v1/completions", {"prompt": "hi", "guided_grammar": bomb})
        assert answer.status_code == 400
        assert "compile" in answer.json()["error"]["message"]
        assert time.perf_counter() - begin < 15
    assert api.post("/v1/completions", {"prompt": "hi", "guided_regex": "a"}).status_code == 200


@pytest.mark.parametrize("strict", [True, False, None])
def test_arguments_of_functions_that_are_not_strict_follow_their_schema_as_far_as_they_can(
    api: Api, strict: bool | None
) -> None:
    parameters = {"type": "object", "properties": {"days": UNENFORCEABLE}, "required": ["days"]}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters, "strict": strict}}
    answer = api.post("/v1/chat/completions", CHAT | {"tools": [tool], "tool_choice": "required"})
    error = answer.json()["error"]
    if strict:
        assert error["message"].startswith("tools: uniqueItems cannot be enforced")
    else:  # past the grammar: the tool does not fit into the context of this model
        assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize("depth", [60, 100, 400, 900, 5000])
def test_a_schema_nested_deeply_is_a_bad_request(api: Api, depth: int) -> None:
    schema = '{"items":' * depth + "{}" + "}" * depth
    body = json.dumps(CHAT)[:-1] + ', "structured_outputs": {"json": SCHEMA}}'.replace("SCHEMA", schema)
    answer = api.post("/v1/chat/completions", content=body.encode(), headers={"content-type": "application/json"})
    assert answer.status_code == (200 if depth == 60 else 400), answer.text

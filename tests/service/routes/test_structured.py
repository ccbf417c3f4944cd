"""What an answer must look like: which grammar reaches the engine, and what is refused before it does."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.api import Api

HI = [{"role": "user", "content": "hi"}]
ENDPOINTS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "hi"},
    "/v1/chat/completions": {"messages": HI},
    "/generate": {"messages": HI},
}
SCHEMA = {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]}
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA, "strict": True}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}


@pytest.fixture
def api(roomy_api: Api) -> Api:
    return roomy_api


@pytest.fixture(params=ENDPOINTS)
def path(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def grammar(api: Api, path: str, **options: Any) -> str | None:
    answer = api.post(path, {**ENDPOINTS[path], **options})
    assert answer.status_code == 200, answer.text
    return api.engine.received[-1].sampling.grammar


@pytest.mark.parametrize(
    ("options", "words"),
    [({"response_format": JSON_SCHEMA}, "town"),
     ({"response_format": {"type": "json_object"}}, "object"),
     ({"structured_outputs": {"json": SCHEMA}}, "town"),
     ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, "town"),
     ({"structured_outputs": {"json_object": True}}, "object"),
     ({"structured_outputs": {"regex": "[ab]+c"}}, "[ab]+c"),
     ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
     ({"structured_outputs": {"grammar": 'start: "x"+'}}, '"x"+'),
     ({"guided_json": SCHEMA}, "town"),
     ({"guided_regex": "[ab]+c"}, "[ab]+c"),
     ({"guided_choice": ["yes", "no"]}, "yes|no"),
     ({"guided_grammar": 'start: "x"+'}, '"x"+')],
)  # fmt: skip
def test_each_way_to_say_it_becomes_a_grammar(api: Api, path: str, options: dict[str, Any], words: str) -> None:
    found = grammar(api, path, **options)
    assert found is not None
    assert words in found


@pytest.mark.parametrize("options", [{}, {"response_format": {"type": "text"}}, {"response_format": None}])
def test_text_is_free(api: Api, path: str, options: dict[str, Any]) -> None:
    assert grammar(api, path, **options) is None


@pytest.mark.parametrize(
    ("options", "param", "words"),
    [({"response_format": {"type": "json_schema"}}, "response_format", "needs json_schema"),
     ({"response_format": {"type": "json_object", "json_schema": {"schema": {}}}}, "response_format", "takes no"),
     ({"response_format": {"type": "xml"}}, "response_format.type", "'json_schema' (got 'xml')"),
     ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}}},
      "response_format.json_schema.schema", "nothing"),
     ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
     ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "found regex, choice"),
     ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex", ""),
     ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "at least 1"),
     ({"structured_outputs": {"grammar": "start: nothing"}}, "structured_outputs.grammar", "nothing"),
     ({"guided_regex": "("}, "guided_regex", ""),
     ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex", "send one of them"),
     ({"guided_json": SCHEMA, "structured_outputs": {"regex": "a"}}, "guided_json", "send one of them")],
)  # fmt: skip
def test_a_mistake_is_told_with_its_field(api: Api, path: str, options: dict[str, Any], param: str, words: str) -> None:
    answer = api.post(path, {**ENDPOINTS[path], **options})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert words in answer.json()["error"]["message"]
    assert not api.engine.received


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/generate"])
def test_beside_tools_the_answer_either_calls_or_has_the_form(api: Api, path: str) -> None:
    either = grammar(api, path, tools=[TOOL], response_format=JSON_SCHEMA)
    assert either is not None
    assert all(word in either for word in ("weather", "town"))
    assert either not in (grammar(api, path, tools=[TOOL]), grammar(api, path, response_format=JSON_SCHEMA))
    must_call = grammar(api, path, tools=[TOOL], response_format=JSON_SCHEMA, tool_choice="required")
    assert must_call == grammar(api, path, tools=[TOOL], tool_choice="required")
    may_not = grammar(api, path, tools=[TOOL], response_format=JSON_SCHEMA, tool_choice="none")
    assert may_not == grammar(api, path, response_format=JSON_SCHEMA)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/generate"])
def test_parameters_of_a_tool_that_no_call_can_be_held_to_are_told(api: Api, path: str) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "nothing"}}}}}
    answer = api.post(path, {"messages": HI, "tools": [tool], "tool_choice": "required"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools")
    assert not api.engine.received

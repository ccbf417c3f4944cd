"""Tools on the endpoints that take messages: what the model is shown, what it calls, streamed and whole."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.api import Api

HI = [{"role": "user", "content": "Weather in Delft?"}]
PATHS = ("/v1/chat/completions", "/generate")
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Tell it", "parameters": PARAMETERS}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Delft \U0001f6f8"}}\n</tool_call>'
NAMED = {"type": "function", "function": {"name": "weather"}}


@pytest.fixture
def api(roomy_api: Api) -> Api:
    return roomy_api


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def ask(api: Api, path: str, **options: Any) -> dict[str, Any]:
    """The choice, with what is said in `content` and `tool_calls` on both endpoints."""
    answer = api.post(path, {"messages": HI, "tools": [TOOL], **options})
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    message = choice.get("message", {"content": choice.get("text"), "tool_calls": choice.get("tool_calls")})
    return {**choice, "content": message["content"] or "", "tool_calls": message.get("tool_calls")}


def stream(api: Api, path: str, **options: Any) -> dict[str, Any]:
    """The same, put together from the chunks."""
    content, last = "", dict[str, Any]()
    calls: dict[int, dict[str, Any]] = {}
    for chunk in api.events(path, {"messages": HI, "tools": [TOOL], **options}):
        for choice in chunk["choices"]:
            last = choice
            told = choice.get("delta", choice)
            content += told.get("content") or told.get("text") or ""
            for call in told.get("tool_calls", ()):
                whole = calls.setdefault(call["index"], {"id": None, "name": None, "arguments": ""})
                whole["id"] = whole["id"] or call.get("id")
                whole["name"] = whole["name"] or call["function"].get("name")
                whole["arguments"] += call["function"]["arguments"]
    return {**last, "content": content, "tool_calls": [calls[index] for index in sorted(calls)]}


def test_a_call_is_found_and_is_why_the_answer_ends(api: Api, path: str) -> None:
    api.says(CALL)
    choice = ask(api, path)
    (call,) = choice["tool_calls"]
    assert call["id"].startswith("call_")
    assert (call["type"], call["function"]["name"]) == ("function", "weather")
    assert json.loads(call["function"]["arguments"]) == {"city": "Delft \U0001f6f8"}
    assert (choice["content"], choice["finish_reason"]) == ("", "tool_calls")


def test_an_answer_of_nothing_but_calls_has_no_content(api: Api) -> None:
    api.says(CALL)
    message = api.post("/v1/chat/completions", {"messages": HI, "tools": [TOOL]}).json()["choices"][0]["message"]
    assert message["content"] is None


@pytest.mark.parametrize("says", [CALL, f"Let me look.\n{CALL}\n{CALL}", "No call, <tool_call> or not.", ""])
def test_the_stream_is_the_whole_answer_in_pieces(api: Api, path: str, says: str) -> None:
    api.says(says)
    whole, pieces = ask(api, path), stream(api, path)
    assert pieces["content"] == whole["content"]
    assert pieces["finish_reason"] == whole["finish_reason"]
    assert [(call["name"], call["arguments"]) for call in pieces["tool_calls"]] == [
        (call["function"]["name"], call["function"]["arguments"]) for call in whole["tool_calls"] or ()
    ]
    assert all(call["id"].startswith("call_") for call in pieces["tool_calls"])


def test_text_beside_a_call_stays_content(api: Api, path: str) -> None:
    api.says(f"Let me look.\n{CALL}")
    choice = ask(api, path)
    assert choice["content"].strip() == "Let me look."
    assert len(choice["tool_calls"]) == 1


def test_a_call_that_is_cut_off_ends_for_its_length(api: Api, path: str) -> None:
    api.says(CALL)
    assert ask(api, path, max_tokens=len(api.engine.answer) - 8)["finish_reason"] == "length"


def test_without_tools_what_looks_like_a_call_is_text(api: Api, path: str) -> None:
    api.says(CALL)
    without: list[dict[str, Any]] = [{"tools": None}, {"tools": []}, {"tool_choice": "none"}]
    for options in without:
        choice = ask(api, path, **options)
        assert (choice["content"], choice["tool_calls"], choice["finish_reason"]) == (CALL, None, "stop")


@pytest.mark.parametrize("choice", ["required", NAMED])
def test_a_call_that_must_be_is_held_by_a_grammar(api: Api, path: str, choice: Any) -> None:
    ask(api, path, tool_choice=choice)
    grammar = api.engine.received[-1].sampling.grammar
    assert grammar is not None
    assert "weather" in grammar


@pytest.mark.parametrize("choice", ["auto", "none", None])
def test_a_call_that_may_be_is_not(api: Api, path: str, choice: Any) -> None:
    ask(api, path, tool_choice=choice)
    assert api.engine.received[-1].sampling.grammar is None


def test_a_named_function_ends_as_openai_has_it(api: Api, path: str) -> None:
    api.says(CALL)
    assert ask(api, path, tool_choice=NAMED)["finish_reason"] == "stop"


def test_one_call_is_left_where_calls_are_not_parallel(api: Api, path: str) -> None:
    api.says(f"{CALL}\n{CALL}")
    assert len(ask(api, path, parallel_tool_calls=False)["tool_calls"]) == 1
    assert len(ask(api, path)["tool_calls"]) == 2


def test_the_model_is_shown_tools_calls_and_results(api: Api, path: str) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    talk = [
        *HI,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "drizzle"},
    ]
    ask(api, path, messages=talk)
    shown = api.services.codec.tokenizer.decode(api.engine.received[-1].prompt_ids)
    assert all(word in shown for word in ("weather", "Tell it", "Oslo", "drizzle"))


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [({"tools": [{"type": "web_search"}]}, "tools.0.type", "'function' (got 'web_search')"),
     ({"tools": [{"type": "function"}]}, "tools.0.function", "required"),
     ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name", "pattern"),
     ({"tools": [TOOL, TOOL]}, "tools.1.function.name", "is there twice"),
     ({"tools": [TOOL] * 129}, "tools", "at most 128"),
     ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice", "none, auto, required"),
     ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "(weather)"),
     ({"tools": None, "tool_choice": "required"}, "tool_choice", "no tools"),
     ({"messages": [{"role": "user", "content": "x", "tool_calls": [
        {"id": "1", "function": {"name": "f", "arguments": "{}"}}]}]}, "messages.0.tool_calls", "of the assistant"),
     ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "messages.0.tool_calls.0.function",
      "required"),
     ({"messages": [{"role": "assistant", "tool_calls": []}]}, "messages.0.content", "required"),
     ({"messages": [*HI, {"role": "user", "content": "x", "tool_call_id": "1"}]}, "messages.1.tool_call_id", "role tool"),
     ({"messages": [{"role": "assistant", "tool_calls": [
        {"id": "1", "function": {"name": "f", "arguments": "{"}}]}, *HI]}, "messages[0].tool_calls[0].function.arguments",
      "JSON object")],
)  # fmt: skip
def test_a_mistake_is_told_with_its_field_and_what_is_allowed(
    api: Api, path: str, body: dict[str, Any], param: str, words: str
) -> None:
    answer = api.post(path, {"messages": HI, "tools": [TOOL], **body})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert words in answer.json()["error"]["message"]
    assert not api.engine.received


def test_tools_beside_a_prompt_are_refused(api: Api) -> None:
    answer = api.post("/generate", {"prompt": "hi", "tools": [TOOL]})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools")

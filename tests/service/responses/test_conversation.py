from __future__ import annotations

from typing import Any

import pytest

from lm.errors import UserError
from service.errors import ApiError
from service.responses.conversation import conversation_of, renamed, text_constraint
from service.schemas.responses import ResponseRequest
from service.structured_output import json_object, json_schema

CALL = {"type": "function_call", "call_id": "call_a", "name": "weather", "arguments": '{"city":"Oslo"}'}
RESULT = {"type": "function_call_output", "call_id": "call_a", "output": "rain"}
WEATHER = {"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": True}
TIME = {"type": "function", "name": "time", "description": "What time it is"}


def request(**fields: Any) -> ResponseRequest:
    return ResponseRequest(**{"input": "hi", **fields})


def messages(**fields: Any) -> list[dict[str, Any]]:
    found = conversation_of(request(**fields)).messages
    return [message.model_dump(exclude_unset=True) for message in found or ()]


def test_a_text_is_the_message_of_a_user() -> None:
    assert messages(input="hello") == [{"role": "user", "content": "hello"}]


def test_instructions_are_a_system_message_in_front() -> None:
    assert messages(input="hello", instructions="Be brief.")[0] == {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    "content",
    [
        "one\ntwo",
        [{"type": "input_text", "text": "one"}, {"type": "input_text", "text": "two"}],
        [{"type": "output_text", "text": "one\ntwo", "annotations": [], "logprobs": []}],
    ],
)
def test_content_is_a_text_or_parts(content: Any) -> None:
    assert messages(input=[{"role": "assistant", "content": content}]) == [{"role": "assistant", "content": "one\ntwo"}]


def test_a_type_that_is_missing_or_null_is_a_message() -> None:
    item = {"role": "developer", "content": "x"}
    assert (
        messages(input=[item])
        == messages(input=[{**item, "type": None}])
        == messages(input=[{**item, "type": "message"}])
    )


def test_what_an_answer_brought_can_be_sent_back() -> None:
    said = {"id": "msg_1", "type": "message", "status": "completed", "role": "assistant"}
    part = {"type": "output_text", "text": "Let me look.", "annotations": [], "logprobs": []}
    items = [{**said, "content": [part]}, {**CALL, "id": "fc_1", "status": "completed"}, {**RESULT, "id": None}]
    assistant, tool = messages(input=items)
    assert assistant["content"] == "Let me look."
    assert [call["function"]["name"] for call in assistant["tool_calls"]] == ["weather"]
    assert tool == {"role": "tool", "content": "rain", "tool_call_id": "call_a"}


def test_calls_in_a_row_are_one_message() -> None:
    other = {**CALL, "call_id": "call_b"}
    first, *results = messages(input=[CALL, other, RESULT, {**RESULT, "call_id": "call_b"}])
    assert [call["id"] for call in first["tool_calls"]] == ["call_a", "call_b"]
    assert [result["tool_call_id"] for result in results] == ["call_a", "call_b"]


def test_a_result_without_its_call_is_refused() -> None:
    with pytest.raises(UserError, match="call_id 'call_a'") as caught:
        conversation_of(request(input=[RESULT]))
    assert caught.value.param == "input.0.call_id"


def test_tools_are_those_of_a_chat() -> None:
    tools = conversation_of(request(tools=[WEATHER])).tools
    assert tools is not None
    (tool,) = tools
    assert tool.model_dump(exclude_none=True) == {
        "type": "function",
        "function": {"name": "weather", "parameters": {"type": "object"}, "strict": True},
    }


@pytest.mark.parametrize("choice", ["none", "auto", "required", None])
def test_a_plain_choice_stays(choice: str | None) -> None:
    assert conversation_of(request(tools=[WEATHER], tool_choice=choice)).tool_choice == choice


def test_a_named_choice_is_that_of_a_chat() -> None:
    chosen = conversation_of(request(tools=[WEATHER], tool_choice={"type": "function", "name": "weather"})).tool_choice
    assert not isinstance(chosen, str | None)
    assert chosen.model_dump() == {"type": "function", "function": {"name": "weather"}}


def test_allowed_tools_are_those_of_a_chat() -> None:
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "time"}]}
    conversation = conversation_of(request(tools=[WEATHER, TIME], tool_choice=allowed))
    assert [tool.function.name for tool in conversation.tools or ()] == ["weather", "time"]
    assert not isinstance(conversation.tool_choice, str | None)
    assert conversation.tool_choice.model_dump() == {
        "type": "allowed_tools",
        "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "time"}}]},
    }


def test_a_format_is_that_of_a_chat() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    wanted = {"type": "json_schema", "name": "thing", "schema": schema}
    found, strict, plain = (
        text_constraint(request(text={"format": form, "verbosity": "medium"}))
        for form in (wanted, {**wanted, "strict": True}, {"type": "json_object"})
    )
    assert found is not None
    assert found.grammar == json_schema(schema, param="x", strict=False).grammar
    assert found.param == "text.format.schema"
    assert strict is not None
    assert strict.grammar == json_schema(schema, param="x", strict=True).grammar
    assert plain is not None
    assert (plain.grammar, plain.param) == (json_object(param="x").grammar, "text.format")


@pytest.mark.parametrize("text", [None, {}, {"format": None}, {"format": {"type": "text"}}])
def test_a_text_is_free(text: Any) -> None:
    assert text_constraint(request(text=text)) is None


@pytest.mark.parametrize(
    ("told", "param", "message"),
    [
        (UserError("messages[1].content: too odd", param="messages[1].content"), "input", "input: too odd"),
        (
            ApiError(400, "max_tokens: lower max_tokens to 5", param="max_tokens", code="context_length_exceeded"),
            "max_output_tokens",
            "max_output_tokens: lower max_output_tokens to 5",
        ),
        (
            UserError("tools.1.function.name: 'a' is there twice", param="tools.1.function.name"),
            "tools.1.name",
            "tools.1.name: 'a' is there twice",
        ),
        (UserError("seed: too big", param="seed"), "seed", "seed: too big"),
    ],
)
def test_errors_name_the_fields_of_this_endpoint(told: UserError | ApiError, param: str, message: str) -> None:
    error = renamed(told)
    assert error.param == param
    assert (error.detail if isinstance(error, ApiError) else str(error)) == message
    assert getattr(error, "code", None) == getattr(told, "code", None)

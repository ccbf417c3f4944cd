"""A request of /v1/responses as the chat that it is: the same conversation in the form of /v1/chat/completions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from lm.errors import UserError
from service.errors import ApiError
from service.schemas.messages import (
    AllowedFunctions,
    AllowedToolChoice,
    CalledFunction,
    Function,
    Message,
    NamedFunction,
    NamedToolChoice,
    Tool,
    ToolCall,
    ToolChoice,
)
from service.schemas.requests import Conversation
from service.schemas.response_items import AnyItem, InputFunctionCall, InputFunctionCallOutput, InputMessage
from service.schemas.responses import AllowedTools, FunctionTool, NamedFunctionChoice, ResponseRequest
from service.structured_output import Constraint, json_object, json_schema

CHAT_NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
}
"""Fields of a chat whose errors are told by the name that they have here."""


def conversation_of(body: ResponseRequest) -> Conversation:
    """Raises UserError for the result of a call that nobody made."""
    return Conversation(
        messages=chat_messages(body.instructions, body.input),
        tools=[_tool(tool) for tool in body.tools or ()] or None,
        tool_choice=_choice(body),
        parallel_tool_calls=body.parallel_tool_calls,
        chat_template_kwargs=body.chat_template_kwargs,
    )


def text_constraint(body: ResponseRequest) -> Constraint | None:
    """What `text.format` makes of the answer. Raises UserError for a schema that cannot be."""
    form = None if body.text is None else body.text.format
    if form is None or form.type == "text":
        return None
    if form.json_schema is None:
        return json_object(param="text.format")
    return json_schema(form.json_schema, param="text.format.schema", strict=bool(form.strict))


def chat_messages(instructions: str | None, items: Sequence[AnyItem]) -> list[Message]:
    """Calls that follow each other, and the text of the assistant before them, become one message of the assistant."""
    messages: list[dict[str, Any]] = []
    made: set[str] = set()
    if instructions is not None:
        messages.append({"role": "system", "content": instructions})
    for index, item in enumerate(items):
        match item:
            case InputMessage():
                messages.append({"role": item.role, "content": item.content})
            case InputFunctionCall():
                made.add(item.call_id)
                if not messages or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant"})
                messages[-1].setdefault("tool_calls", []).append(_call(item))
            case InputFunctionCallOutput():
                if item.call_id not in made:
                    param = f"input.{index}.call_id"
                    raise UserError(
                        f"{param}: no function_call before it has the call_id {item.call_id!r}", param=param
                    )
                messages.append({"role": "tool", "content": item.output, "tool_call_id": item.call_id})
    return [Message(**message) for message in messages]


def renamed(error: UserError | ApiError) -> UserError | ApiError:
    """An error of the chat, told by the names that its fields have here."""
    param = error.param or ""
    told = error.detail if isinstance(error, ApiError) else str(error)
    field = re.split(r"[.\[]", param)[0]
    if field == "tools":
        name, message = param.replace(".function", ""), told.replace(".function", "", 1)
    elif field in CHAT_NAMES:
        name = CHAT_NAMES[field]
        message = f"{name}: {told.removeprefix(f'{param}: ')}".replace("max_tokens", "max_output_tokens")
    else:
        return error
    if isinstance(error, ApiError):
        return ApiError(error.status_code, message, type=error.type, param=name, code=error.code)
    return type(error)(message, param=name)


def _call(item: InputFunctionCall) -> ToolCall:
    return ToolCall(id=item.call_id, function=CalledFunction(name=item.name, arguments=item.arguments))


def _tool(tool: FunctionTool) -> Tool:
    return Tool(type="function", function=Function(**{name: getattr(tool, name) for name in Function.model_fields}))


def _choice(body: ResponseRequest) -> ToolChoice:
    match body.tool_choice:
        case AllowedTools(mode=mode, tools=tools):
            allowed = AllowedFunctions(mode=mode, tools=[_named(tool) for tool in tools])
            return AllowedToolChoice(type="allowed_tools", allowed_tools=allowed)
        case NamedFunctionChoice() as tool:
            return _named(tool)
        case choice:
            return choice


def _named(tool: NamedFunctionChoice) -> NamedToolChoice:
    return NamedToolChoice(type="function", function=NamedFunction(name=tool.name))

"""The messages of a conversation and the tools that may be called in it, as clients send them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, ValidationInfo, WithJsonSchema, field_validator

from service.schemas.fields import Content, Only
from trainer.strict import Strict

MAX_TOOLS = 128
NAME_PATTERN = r"^[a-zA-Z0-9_-]{1,64}$"


class CalledFunction(Strict):
    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    arguments: str
    """A JSON object, as text."""


class ToolCall(Strict):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None
    """Accepted, since clients that put a stream together leave it in."""


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    """`developer` is another name for `system`. `tool` brings the result of a call."""
    tool_calls: list[ToolCall] | None = None
    """What the assistant called."""
    tool_call_id: str | None = None
    """Which call of the assistant this is the result of."""
    content: Annotated[Content, Field(validate_default=True)] = None
    """May be left out only beside tool calls."""
    name: str | None = None
    """Accepted, and not shown to the model."""
    refusal: Annotated[Any, Only(None)] = None
    annotations: Annotated[Any, Only(None, [])] = None
    audio: Annotated[Any, Only(None)] = None
    function_call: Annotated[Any, Only(None, mend="send tool_calls, which came after it")] = None

    @field_validator("tool_calls")
    @classmethod
    def _by_the_assistant(cls, value: list[ToolCall] | None, info: ValidationInfo) -> list[ToolCall] | None:
        if value and info.data.get("role", "assistant") != "assistant":
            raise ValueError("only messages of the assistant have tool calls")
        return value

    @field_validator("tool_call_id")
    @classmethod
    def _of_a_result(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("role", "tool") != "tool":
            raise ValueError("only messages of role tool have it")
        return value

    @field_validator("content")
    @classmethod
    def _there(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None and not info.data.get("tool_calls"):
            raise ValueError("this field is required; it must be a text or a list of text parts")
        return value


class Function(Strict):
    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    description: str | None = None
    """Tells the model when and how to call it."""
    parameters: dict[str, Any] | None = None
    """A JSON schema of an object. Without it the function has no parameters."""
    strict: bool | None = None
    """The arguments follow the schema whenever it is called. They do in any case where `tool_choice` asks for a call."""


class Tool(Strict):
    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    name: str


class NamedToolChoice(Strict):
    type: Literal["function"]
    function: NamedFunction


class AllowedFunctions(Strict):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedToolChoice], Field(min_length=1, max_length=MAX_TOOLS)]


class AllowedToolChoice(Strict):
    """The model is shown all tools, and may call these."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedFunctions


CHOICES = ("none", "auto", "required")
NAMED_SCHEMA = {
    "type": "object",
    "properties": {
        "type": {"const": "function"},
        "function": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]},
    },
    "required": ["type", "function"],
}
ALLOWED_SCHEMA = {
    "type": "object",
    "properties": {
        "type": {"const": "allowed_tools"},
        "allowed_tools": {
            "type": "object",
            "properties": {
                "mode": {"enum": ["auto", "required"]},
                "tools": {"type": "array", "items": NAMED_SCHEMA, "minItems": 1, "maxItems": MAX_TOOLS},
            },
            "required": ["mode", "tools"],
        },
    },
    "required": ["type", "allowed_tools"],
}
CHOICE_SCHEMA = {
    "anyOf": [{"enum": [*CHOICES]}, NAMED_SCHEMA, ALLOWED_SCHEMA, {"type": "null"}],
    "description": "`none`: no call. `auto`: the model decides. `required`: at least one call. Or the tool to call, or "
    "those that may be.",
}


def parse_tool_choice(value: object) -> str | NamedToolChoice | AllowedToolChoice | None:
    if value is None or isinstance(value, NamedToolChoice | AllowedToolChoice) or value in CHOICES:
        return value
    is_several = isinstance(value, dict) and value.get("type") == "allowed_tools"
    try:
        return AllowedToolChoice.model_validate(value) if is_several else NamedToolChoice.model_validate(value)
    except ValueError:
        named = '{"type": "function", "function": {"name": ...}}'
        several = f'{{"type": "allowed_tools", "allowed_tools": {{"mode": "auto" or "required", "tools": [{named}]}}}}'
        raise ValueError(f"must be one of {', '.join(CHOICES)}, or {named}, or {several}") from None


ToolChoice = Annotated[
    str | NamedToolChoice | AllowedToolChoice | None, PlainValidator(parse_tool_choice), WithJsonSchema(CHOICE_SCHEMA)
]

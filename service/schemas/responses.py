"""The body of POST /v1/responses. Null means the default, as everywhere."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    PlainValidator,
    ValidationInfo,
    WithJsonSchema,
    WrapValidator,
    field_validator,
    model_validator,
)

from service.schemas.fields import MaxTokens, NumLogprobs, Only
from service.schemas.messages import CHOICES, MAX_TOOLS, Function
from service.schemas.requests import BaseSampling
from service.schemas.response_items import Input
from trainer.strict import Strict

NOTHING_STORED = "nothing is stored here: send the whole conversation in input"
LOGPROBS = "message.output_text.logprobs"
Includable = Literal[
    "message.output_text.logprobs",
    "message.input_image.image_url",
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
]
MAX_METADATA, MAX_KEY_CHARS, MAX_VALUE_CHARS = 16, 64, 512
METADATA_SCHEMA = {
    "anyOf": [
        {
            "type": "object",
            "additionalProperties": {"type": "string", "maxLength": MAX_VALUE_CHARS},
            "maxProperties": MAX_METADATA,
        },
        {"type": "null"},
    ],
    "description": "Told back with the answer.",
}


def parse_metadata(value: object) -> dict[str, str] | None:
    if value is None:
        return None
    if not isinstance(value, dict) or len(value) > MAX_METADATA:
        raise ValueError(f"must be an object of at most {MAX_METADATA} keys, each with a text")
    for key, text in value.items():
        if not isinstance(text, str) or len(text) > MAX_VALUE_CHARS or len(key) > MAX_KEY_CHARS:
            allowed = f"keys have at most {MAX_KEY_CHARS} characters, and are texts of at most {MAX_VALUE_CHARS}"
            raise ValueError(f"{key!r:.80}: {allowed}")
    return value


class FunctionTool(Function):
    """A function that the answer may call. Unlike in chats its fields stand beside its type."""

    type: Literal["function"]
    defer_loading: Annotated[Any, Only(None, False)] = None
    allowed_callers: Annotated[Any, Only(None, ["direct"])] = None
    output_schema: dict[str, Any] | None = None
    """Accepted, and not shown to the model."""


def parse_tool(value: object, _: object) -> FunctionTool:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind != "function":
        raise ValueError('only tools of type "function" are supported: none are built in')
    return FunctionTool.model_validate(value)


class TextFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    """What an answer of type json_schema follows; bounded in size, and checked before the answer begins."""
    strict: bool | None = None
    """The answer follows the schema in any case."""

    @model_validator(mode="after")
    def _with_its_schema(self) -> TextFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            needs = "needs a" if self.json_schema is None else "takes no"
            raise ValueError(f"type {self.type} {needs} schema")
        return self


class TextConfig(Strict):
    format: TextFormat | None = None
    """`json_object` and `json_schema` make the answer JSON, the latter one that follows the schema."""
    verbosity: Annotated[Any, Only(None, "medium")] = None


class Reasoning(Strict):
    """The models served here are not told how much to reason: only what asks for nothing is taken."""

    effort: Annotated[Any, Only(None, "none")] = None
    summary: Annotated[Any, Only(None)] = None
    generate_summary: Annotated[Any, Only(None)] = None
    context: Annotated[Any, Only(None, "auto")] = None
    mode: Annotated[Any, Only(None, "standard")] = None


class ResponseStreamOptions(Strict):
    include_obfuscation: bool | None = None
    """Accepted, and without effect."""


class NamedFunctionChoice(Strict):
    type: Literal["function"]
    name: str


class AllowedTools(Strict):
    """The model is shown all tools, and may call these."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedFunctionChoice], Field(min_length=1, max_length=MAX_TOOLS)]


CHOICE_FORMS: dict[str, type[NamedFunctionChoice | AllowedTools]] = {
    "function": NamedFunctionChoice,
    "allowed_tools": AllowedTools,
}
NAMED_SCHEMA = {
    "type": "object",
    "properties": {"type": {"const": "function"}, "name": {"type": "string"}},
    "required": ["type", "name"],
}
ALLOWED_SCHEMA = {
    "type": "object",
    "properties": {
        "type": {"const": "allowed_tools"},
        "mode": {"enum": ["auto", "required"]},
        "tools": {"type": "array", "items": NAMED_SCHEMA, "minItems": 1},
    },
    "required": ["type", "mode", "tools"],
}
CHOICE_SCHEMA = {
    "anyOf": [{"enum": [*CHOICES]}, NAMED_SCHEMA, ALLOWED_SCHEMA, {"type": "null"}],
    "description": "`none`: no call. `auto`: the model decides. `required`: at least one call. Or the tool to call, or "
    "those to choose from.",
}


def parse_tool_choice(value: object) -> str | NamedFunctionChoice | AllowedTools | None:
    if value is None or value in CHOICES:
        return value
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in CHOICE_FORMS:
        named = '{"type": "function", "name": ...}'
        raise ValueError(f"must be one of {', '.join(CHOICES)}, or {named}, or of type allowed_tools")
    return CHOICE_FORMS[kind].model_validate(value)


ResponseToolChoice = Annotated[
    str | NamedFunctionChoice | AllowedTools | None, PlainValidator(parse_tool_choice), WithJsonSchema(CHOICE_SCHEMA)
]


class ResponseRequest(BaseSampling):
    """POST /v1/responses. Only `input` is required."""

    input: Input
    """A text, or the items of a conversation: messages, calls of functions and what they resulted in."""
    instructions: str | None = None
    """A system message before the conversation."""
    max_output_tokens: MaxTokens | None = None
    """Tokens to generate at most. Default: the rest of the context."""
    text: TextConfig | None = None
    tools: Annotated[list[Annotated[FunctionTool, WrapValidator(parse_tool)]], Field(max_length=MAX_TOOLS)] | None = (
        None
    )
    """Functions that the answer may call. There are no built-in tools."""
    tool_choice: ResponseToolChoice = None
    parallel_tool_calls: bool | None = None
    """Whether one answer may call several times; true by default."""
    max_tool_calls: Annotated[int, Field(ge=1)] | None = None
    """Bounds calls of built-in tools, of which there are none."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables for the chat template, beside its own."""
    include: list[Includable] | None = None
    """`message.output_text.logprobs` returns the log probability of each token. The others name what no answer has."""
    top_logprobs: NumLogprobs | None = None
    """And those of so many of the likeliest ones."""
    stream_options: ResponseStreamOptions | None = None
    store: bool | None = None
    """Accepted, and answered with false: nothing is stored."""
    metadata: Annotated[dict[str, str] | None, PlainValidator(parse_metadata), WithJsonSchema(METADATA_SCHEMA)] = None
    user: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    reasoning: Reasoning | None = None

    previous_response_id: Annotated[Any, Only(None, mend=NOTHING_STORED)] = None
    conversation: Annotated[Any, Only(None, mend=NOTHING_STORED)] = None
    prompt: Annotated[Any, Only(None, mend="no prompts are stored here: send input")] = None
    background: Annotated[Any, Only(None, False, mend="answers are made while the client waits")] = None
    truncation: Annotated[Any, Only(None, "disabled", mend="shorten input")] = None
    context_management: Annotated[Any, Only(None, [])] = None
    moderation: Annotated[Any, Only(None)] = None

    @field_validator("stream_options")
    @classmethod
    def _only_in_a_stream(
        cls, value: ResponseStreamOptions | None, info: ValidationInfo
    ) -> ResponseStreamOptions | None:
        if value is not None and not info.data.get("stream"):
            raise ValueError("only allowed with stream: true; remove it or set stream")
        return value

    @property
    def num_logprobs(self) -> int | None:
        """How many alternatives are wanted beside each token of the answer; None is no log probabilities at all."""
        return (self.top_logprobs or 0) if self.top_logprobs or LOGPROBS in (self.include or ()) else None

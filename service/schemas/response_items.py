"""The items of a conversation that clients send to /v1/responses."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import FailFast, Field, GetJsonSchemaHandler, PlainValidator, TypeAdapter, WithJsonSchema, WrapValidator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from service.schemas.fields import Only
from service.schemas.messages import NAME_PATTERN
from trainer.strict import Strict

ItemStatus = Literal["in_progress", "completed", "incomplete"]

MAX_ITEMS = 2048
MAX_ID_CHARS = 256
TEXT_PARTS = ("input_text", "output_text", "text")
PART_EXTRAS = {"annotations", "logprobs", "prompt_cache_breakpoint"}
"""What parts of an earlier answer bring along. It is not shown to the model."""
PART_FIELDS = {"type", "text", *PART_EXTRAS}
PART_SCHEMA = {
    "type": "object",
    "properties": {"type": {"enum": [*TEXT_PARTS]}, "text": {"type": "string"}} | {name: {} for name in PART_EXTRAS},
    "required": ["type", "text"],
    "additionalProperties": False,
}
TEXT_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "array", "items": PART_SCHEMA, "minItems": 1}]}


def parse_text(value: object) -> str:
    """The text of an item; several parts become lines."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise ValueError('must be a text, or a list of parts {"type": "input_text", "text": ...}')
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in TEXT_PARTS:
            raise ValueError(f"only parts of type {', '.join(TEXT_PARTS)} are supported: no images, files or audio")
        if not isinstance(part.get("text"), str) or not part.keys() <= PART_FIELDS:
            raise ValueError(f'a part of type {kind} must have a "text", and nothing else')
    return "\n".join(part["text"] for part in value)


Text = Annotated[str, PlainValidator(parse_text), WithJsonSchema(TEXT_SCHEMA)]
Id = Annotated[str, Field(max_length=MAX_ID_CHARS)]
CallId = Annotated[str, Field(min_length=1, max_length=MAX_ID_CHARS)]


class SentItem(Strict):
    """What every item may bring from an answer that it was part of, without effect."""

    id: Id | None = None
    status: ItemStatus | None = None


class InputMessage(SentItem):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Text
    phase: Literal["commentary", "final_answer"] | None = None
    """Accepted, and not shown to the model."""


class InputFunctionCall(SentItem):
    """A call that the model made in an earlier answer."""

    type: Literal["function_call"]
    call_id: CallId
    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    arguments: str
    """A JSON object, as text."""
    namespace: Annotated[Any, Only(None)] = None
    caller: Annotated[Any, Only(None, {"type": "direct"})] = None


class InputFunctionCallOutput(SentItem):
    """What such a call resulted in."""

    type: Literal["function_call_output"]
    call_id: CallId
    output: Text
    name: Id | None = None
    """Accepted, and not shown to the model, which knows the call."""
    namespace: Annotated[Any, Only(None)] = None
    caller: Annotated[Any, Only(None, {"type": "direct"})] = None


AnyItem = InputMessage | InputFunctionCall | InputFunctionCallOutput
ITEMS: dict[str, type[AnyItem]] = {
    "message": InputMessage,
    "function_call": InputFunctionCall,
    "function_call_output": InputFunctionCallOutput,
}
REFUSED_ITEMS = {
    "item_reference": "nothing is stored here that an item_reference could mean: send the item itself",
    "reasoning": "items of type reasoning are not shown to the models served here: leave them out",
}


def _parse_item(value: object, _: object) -> AnyItem:
    """By its `type`, so that an error names the field alone."""
    kind = (value.get("type") or "message") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(kind, str) or kind not in ITEMS:
        reason = REFUSED_ITEMS.get(kind) if isinstance(kind, str) else None
        raise ValueError(reason or f"must be an object of type {', '.join(ITEMS)}: nothing else is supported")
    return ITEMS[kind].model_validate({**value, "type": kind})


Items = Annotated[
    tuple[Annotated[AnyItem, WrapValidator(_parse_item)], ...],
    Field(min_length=1, max_length=MAX_ITEMS, strict=False),
    FailFast(),
]
_items: TypeAdapter[tuple[AnyItem, ...]] = TypeAdapter(Items)


class _TextOrItems:
    """Validates the items of a list, or makes a text the message of a user."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"anyOf": [{"type": "string"}, handler(schema)]}


def _parse_input(value: object, _: object) -> tuple[AnyItem, ...]:
    if isinstance(value, str):
        return (InputMessage(role="user", content=value),)
    if not isinstance(value, list) or not value:
        raise ValueError("must be a text, or a list of items such as messages with role and content; not empty")
    return _items.validate_python(value)


Input = Annotated[Items, WrapValidator(_parse_input), _TextOrItems()]
"""A text, or the items of a conversation."""

"""Field types of the request bodies. Each turns what OpenAI clients may send into one plain form, or says what it takes.

What bounds a request stands here, in one place.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler, PlainValidator, WithJsonSchema
from pydantic_core import CoreSchema, core_schema

MAX_PROMPTS = 128
MAX_MESSAGES = 10_000
MAX_N = 128
MAX_ANSWERS = 256
"""Prompts x answers to each."""
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
"""OpenAI takes 4; clients written for vLLM send more."""
MAX_STOP_CHARS = 1024
MAX_STOP_TOKENS = 128
MAX_BAD_WORDS = 128
MAX_BAD_WORD_CHARS = 256
MAX_BIASES = 1024
MAX_BIAS = 100

INTEGERS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
STRINGS = {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_PROMPTS}
PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        STRINGS,
        INTEGERS,
        {"type": "array", "items": INTEGERS, "minItems": 1, "maxItems": MAX_PROMPTS},
    ],
    "description": "Text, a list of texts, token ids, or a list of lists of token ids. Token ids are used as they are.",
}
STOP_STRING = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}
STOP_SCHEMA = {
    "anyOf": [STOP_STRING, {"type": "array", "items": STOP_STRING, "maxItems": MAX_STOP_STRINGS}, {"type": "null"}],
    "description": f"Up to {MAX_STOP_STRINGS} strings; the answer ends before the first of them that it would contain.",
}
TEXT_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": False,
}
CONTENT_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "array", "items": TEXT_PART, "minItems": 1}, {"type": "null"}]}
BIAS_SCHEMA = {
    "anyOf": [
        {
            "type": "object",
            "additionalProperties": {"type": "number", "minimum": -MAX_BIAS, "maximum": MAX_BIAS},
            "maxProperties": MAX_BIASES,
        },
        {"type": "null"},
    ],
    "description": "Token id -> what is added to its logit; -100 bans a token, 100 forces it.",
}


def parse_prompts(value: object) -> tuple[str, ...] | tuple[tuple[int, ...], ...]:
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not value:
        raise ValueError("must be a text, a list of texts, a list of token ids or a list of such lists; not empty")
    if _all_token_ids(value):
        return (tuple(value),)
    if len(value) > MAX_PROMPTS:
        raise ValueError(f"at most {MAX_PROMPTS} prompts in one request")
    if all(isinstance(item, str) for item in value):
        return tuple(value)
    if all(isinstance(item, list) and item and _all_token_ids(item) for item in value):
        return tuple(tuple(item) for item in value)
    raise ValueError("all its items must be texts, or all token ids (0 or more), or all lists of token ids; none empty")


def _all_token_ids(items: list[Any]) -> bool:
    return all(type(item) is int and item >= 0 for item in items)


def parse_stop(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    strings = value if isinstance(value, list) else [value]
    if not all(isinstance(item, str) and 0 < len(item) <= MAX_STOP_CHARS for item in strings):
        raise ValueError(f"must be a string of 1 to {MAX_STOP_CHARS} characters, or a list of such strings")
    if len(strings) > MAX_STOP_STRINGS:
        raise ValueError(f"at most {MAX_STOP_STRINGS} stop strings")
    return tuple(strings)


def parse_content(value: object) -> str | None:
    """The text of a message; several text parts become lines."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise ValueError('must be a text, or a list of parts {"type": "text", "text": ...}')
    for part in value:
        if not isinstance(part, dict) or part.keys() != {"type", "text"} or not isinstance(part["text"], str):
            raise ValueError('only parts {"type": "text", "text": ...} are supported')
        if part["type"] != "text":
            raise ValueError('only parts of type "text" are supported')
    return "\n".join(part["text"] for part in value)


def parse_bias(value: object) -> dict[int, float] | None:
    if value is None:
        return None
    if not isinstance(value, dict) or len(value) > MAX_BIASES:
        raise ValueError(f"must be an object of at most {MAX_BIASES} token ids and numbers")
    for token, bias in value.items():
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            raise ValueError(f"its keys must be token ids, such as {json.dumps('50256')}; {token!r:.40} is none")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not abs(bias) <= MAX_BIAS:
            raise ValueError(f"the bias of token {token} must be a number from -{MAX_BIAS} to {MAX_BIAS}")
    return {int(token): float(bias) for token, bias in value.items()}


Prompts = Annotated[
    tuple[str, ...] | tuple[tuple[int, ...], ...], PlainValidator(parse_prompts), WithJsonSchema(PROMPT_SCHEMA)
]
Stop = Annotated[tuple[str, ...], PlainValidator(parse_stop), WithJsonSchema(STOP_SCHEMA)]
Content = Annotated[str | None, PlainValidator(parse_content), WithJsonSchema(CONTENT_SCHEMA)]
LogitBias = Annotated[dict[int, float] | None, PlainValidator(parse_bias), WithJsonSchema(BIAS_SCHEMA)]
MaxTokens = Annotated[int, Field(ge=1)]
TokenId = Annotated[int, Field(ge=0)]
BadWord = Annotated[str, Field(min_length=1, max_length=MAX_BAD_WORD_CHARS)]
NumLogprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]


class Only:
    """Marks a documented field of which only the values that change nothing are taken.

    Whatever else a client sends there would change the answer, so it is refused instead of ignored.
    """

    def __init__(self, *neutral: Any, mend: str = "leave it out") -> None:
        self.neutral = neutral
        self.mend = mend

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": [*self.neutral], "description": f"Other values are not supported: {self.mend}."}

    def _check(self, value: Any) -> Any:
        if not any(value == item and isinstance(value, bool) == isinstance(item, bool) for item in self.neutral):
            shown = " or ".join("null" if item is None else json.dumps(item) for item in self.neutral)
            raise ValueError(f"other values than {shown} are not supported: {self.mend}")
        return value

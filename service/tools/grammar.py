"""Calls as a grammar of llguidance, so that what follows it is calls that can be made, whatever the model has learned."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from service.schemas.messages import Function
from service.tools.formats import ToolFormat

MAX_CALLS = 16
"""In one answer that must call. A model that has not learned to stop would call until its tokens are used up."""
SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As calls are written in training data; a model that has not learned them would write white space for ever."""
COMBINED = ("$ref", "allOf", "anyOf", "oneOf", "if", "unevaluatedProperties")
NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}}


def calls_grammar(
    format: ToolFormat, functions: Sequence[Function], *, max_calls: int, special_tokens: Mapping[str, int]
) -> str:
    """From 1 to `max_calls` calls and nothing else, in Lark's form.

    `special_tokens` are parts of the format that the model has a token for; their text alone would not be that token.
    """
    begin, separator, end = (_literal(text, special_tokens) for text in (format.begin, format.separator, format.end))
    more = f"({separator} call){{0,{max_calls - 1}}}" if max_calls > 1 else ""
    lines = [
        f"start: {begin} call {more} {end}",
        "call: " + " | ".join(f"call_{index}" for index in range(len(functions))),
    ]
    for index, function in enumerate(functions):
        before = _literal(format.before_name + function.name + format.before_arguments, special_tokens)
        lines += [
            f"call_{index}: {before} arguments_{index} {_literal(format.after_arguments, special_tokens)}",
            f"arguments_{index}: %json {json.dumps(_closed(function.parameters))}",
        ]
    return "\n".join(lines)


def _closed(parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    """The schema of the arguments. A function that lists its parameters gets no others, unless it says so."""
    schema = {"type": "object", **(parameters or NO_PARAMETERS)}
    if "properties" in schema and not any(key in schema for key in COMBINED):
        schema.setdefault("additionalProperties", "patternProperties" in schema)
    return schema | {"x-guidance": SPACING}


def _literal(text: str, special_tokens: Mapping[str, int]) -> str:
    """`text` in a rule; nothing for an empty one."""
    for token, token_id in special_tokens.items():
        before, found, behind = text.partition(token)
        if found:
            return f"{_literal(before, special_tokens)} <[{token_id}]> {_literal(behind, special_tokens)}"
    return json.dumps(text) if text else ""

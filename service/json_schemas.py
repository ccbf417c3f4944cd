"""What JSON schemas may be that answers and calls are held to, and how JSON is written then. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lm.errors import UserError

MAX_DEPTH = 64
"""Of objects and lists within each other. llguidance ends at 128."""
MAX_MEMBERS = 32_768
JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As JSON is mostly written where models learn it. Free white space would let a model write it for ever."""
OTHERS = ("$ref", "anyOf", "oneOf", "if", "dependentSchemas")
OF_OBJECTS = ("properties", "required", "additionalProperties")
MORE = ("unevaluatedProperties", "patternProperties", "minProperties")
SCHEMA_MAPS = ("properties", "$defs", "definitions")
SCHEMA_LISTS = ("anyOf", "oneOf", "prefixItems")
SCHEMAS = ("items", "additionalProperties")


def closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """`schema` with no more properties than each object lists, unless it says so. What follows it follows `schema`;
    a model that may always add one more property may never end."""
    return dict(schema) if _combines(schema) else _closed(schema)


def check_schema(schema: Mapping[str, Any], param: str) -> None:
    """Raises UserError for what is too large or nested too deeply, refers to elsewhere, or is not JSON."""
    num_members = 0
    left: list[tuple[Any, int]] = [(schema, 1)]
    while left:
        value, depth = left.pop()
        num_members += len(value)
        if num_members > MAX_MEMBERS:
            raise UserError(f"{param}: more than {MAX_MEMBERS} values: make it smaller", param=param)
        if depth > MAX_DEPTH:
            raise UserError(f"{param}: more than {MAX_DEPTH} objects and lists within each other", param=param)
        if isinstance(value, Mapping):
            _check_reference(value.get("$ref"), param)
            left += [(item, depth + 1) for item in value.values() if isinstance(item, Mapping | list)]
        else:
            left += [(item, depth + 1) for item in value if isinstance(item, Mapping | list)]


def _check_reference(reference: object, param: str) -> None:
    if isinstance(reference, str) and not reference.startswith("#"):
        message = f"{param}: $ref: {reference!r:.200} is not in this schema, and nothing is fetched: put it into $defs"
        raise UserError(message, param=param)


def _closed(schema: Any) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    made: dict[str, Any] = {}
    for key, value in schema.items():
        if key in SCHEMA_MAPS and isinstance(value, Mapping):
            made[key] = {name: _closed(item) for name, item in value.items()}
        elif key in SCHEMA_LISTS and isinstance(value, list):
            made[key] = [_closed(item) for item in value]
        else:
            made[key] = _closed(value) if key in SCHEMAS else value
    if _lists_all(made):
        made.setdefault("additionalProperties", False)
    return made


def _lists_all(schema: Mapping[str, Any]) -> bool:
    """Whether it names properties, and nothing else in it asks for others."""
    properties, required = schema.get("properties"), schema.get("required", [])
    if not isinstance(properties, Mapping) or not isinstance(required, list):
        return False
    return not any(key in schema for key in MORE) and all(isinstance(n, str) and n in properties for n in required)


def _combines(value: Any) -> bool:
    """Whether an object in it has to follow several schemas, none of which lists all of its properties."""
    if isinstance(value, list):
        return any(map(_combines, value))
    if not isinstance(value, Mapping):
        return False
    is_beside = any(key in value for key in OTHERS) and any(key in value for key in OF_OBJECTS)
    return "allOf" in value or is_beside or any(map(_combines, value.values()))

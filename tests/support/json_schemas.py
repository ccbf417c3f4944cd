"""Random JSON schemas whose values are bounded in length, so that any answer that follows one comes to its end."""

from __future__ import annotations

import random
from typing import Any

WORDS = ("name", "größe", "city", "items", "a b", 'quoted "word"', "状态", "count", "is_ok", "note", "url", "x1", "🙂")
FORMATS = ("uuid", "ipv4")  # others have parts of any length, or days that no month has
PATTERNS = ("^[A-Z]{2}-[0-9]{3}$", "^(red|green|blue)$", "^[a-z]{1,8}@[a-z]{1,8}\\.com$", "^v[0-9]\\.[0-9]{1,2}$")
CONSTANTS = (None, True, 0, -3, 2.5, "", "a", 'say "hi"\n', "<|im_end|>", "日本", [1, "x"], {"k": [None]})


def random_schema(rng: random.Random, *, depth: int = 3) -> dict[str, Any]:
    """An object at the root, as response_format wants it; `depth` levels of objects and lists."""
    definitions = {"thing": _object(rng, 1, has_things=False)}
    return {**_object(rng, depth, has_things=True), "$defs": definitions}


def _value(rng: random.Random, depth: int, *, has_things: bool) -> dict[str, Any]:
    kinds = [_string, _number, _choice]
    if depth > 0:
        kinds += [_list, _union, _object]
    if has_things and rng.random() < 0.15:
        return {"$ref": "#/$defs/thing"}
    kind = rng.choice(kinds)
    return kind(rng, depth - 1, has_things=has_things)


def _object(rng: random.Random, depth: int, *, has_things: bool) -> dict[str, Any]:
    names = rng.sample(WORDS, rng.randint(1, 4))
    return {
        "type": "object",
        "properties": {name: _value(rng, depth, has_things=has_things) for name in names},
        "required": [name for name in names if rng.random() < 0.8],
        "additionalProperties": False,
    }


def _list(rng: random.Random, depth: int, *, has_things: bool) -> dict[str, Any]:
    low = rng.randint(0, 1)
    items = _value(rng, depth, has_things=has_things)
    return {"type": "array", "items": items, "minItems": low, "maxItems": low + rng.randint(0, 2)}


def _union(rng: random.Random, depth: int, *, has_things: bool) -> dict[str, Any]:
    return {"anyOf": [{"type": "null"}, _value(rng, depth, has_things=has_things)]}


def _string(rng: random.Random, depth: int, *, has_things: bool) -> dict[str, Any]:
    kind = rng.random()
    if kind < 0.2:
        return {"type": "string", "format": rng.choice(FORMATS)}
    if kind < 0.5:
        return {"type": "string", "pattern": rng.choice(PATTERNS)}
    low = rng.randint(0, 5)
    return {"type": "string", "minLength": low, "maxLength": low + rng.randint(0, 10)}


def _number(rng: random.Random, depth: int, *, has_things: bool) -> dict[str, Any]:
    low = rng.randint(-1000, 1000)
    bounds = {"minimum": low, "maximum": low + rng.randint(1, 5000)}
    if rng.random() < 0.3:
        return {"type": "number", "multipleOf": 0.25, **bounds}
    return {"type": "integer", **bounds}


def _choice(rng: random.Random, depth: int, *, has_things: bool) -> dict[str, Any]:
    kind = rng.random()
    if kind < 0.3:
        return {"const": rng.choice(CONSTANTS)}
    if kind < 0.5:
        return {"type": "boolean"}
    return {"enum": rng.sample(CONSTANTS, rng.randint(1, 4))}

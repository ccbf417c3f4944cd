"""JSON values for a JSON schema: most follow it in part, none is promised to follow it whole."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

any_text = st.text(st.characters(exclude_categories=()), max_size=20)  # half characters included
numbers = st.one_of(
    st.integers(-3, 300), st.integers(), st.floats(), st.sampled_from([2**63, -(2**63) - 1, 10**400, 1e308, 0.0])
)
junk = st.recursive(
    st.none() | st.booleans() | numbers | any_text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(any_text, inner, max_size=4),
    max_leaves=8,
)


def values(schema: dict[str, Any], definitions: dict[str, Any], *, depth: int = 0) -> st.SearchStrategy[Any]:
    """Values of `schema`, with junk in places. `definitions` are the document's components.schemas."""
    if depth > 6:
        return junk
    if "$ref" in schema:
        return values(definitions[schema["$ref"].rsplit("/", 1)[1]], definitions, depth=depth)
    followed = _followed(schema, definitions, depth + 1)
    return st.integers(0, 9).flatmap(lambda roll: junk if roll == 0 else followed)


def _followed(schema: dict[str, Any], definitions: dict[str, Any], depth: int) -> st.SearchStrategy[Any]:
    if options := schema.get("anyOf") or schema.get("oneOf"):
        return st.one_of([values(option, definitions, depth=depth) for option in options])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "const" in schema:
        return st.just(schema["const"])
    match schema.get("type"):
        case "object":
            return _object(schema, definitions, depth)
        case "array":
            items = values(schema.get("items", {}), definitions, depth=depth)
            return st.lists(items, max_size=4)
        case "string":
            return st.from_regex(schema["pattern"]) | any_text if "pattern" in schema else any_text
        case "integer" | "number":
            return _bounded(schema) | numbers
        case "boolean":
            return st.booleans()
        case "null":
            return st.none()
    return junk


def _bounded(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    least = schema.get("minimum", schema.get("exclusiveMinimum", -300))
    most = schema.get("maximum", schema.get("exclusiveMaximum", 300))
    if schema["type"] == "integer":
        return st.integers(least, max(least, min(most, least + 600)))
    return st.floats(least, max(least, most))


def _object(schema: dict[str, Any], definitions: dict[str, Any], depth: int) -> st.SearchStrategy[dict[str, Any]]:
    fields = {name: values(field, definitions, depth=depth) for name, field in schema.get("properties", {}).items()}
    required = {name: fields.pop(name) for name in schema.get("required", ()) if name in fields}
    known = st.fixed_dictionaries(required, optional=fields)
    surprise = st.dictionaries(any_text, junk, max_size=1)
    return st.tuples(known, st.integers(0, 9), surprise).map(
        lambda drawn: drawn[0] | (drawn[2] if not drawn[1] else {})
    )

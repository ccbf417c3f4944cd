"""Bodies and configurations that are taken strictly, and the words in which their mistakes are told. Torch-free."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationError, model_validator
from pydantic_core import CoreSchema

from lm.errors import UserError

OptionsT = TypeVar("OptionsT", bound=BaseModel)

MAX_FIELDS = 256
SECRET = "secret"
"""Type of the mistakes in a field whose value no message shows."""


def _fail_fast(schema: Any) -> None:
    for node in schema if isinstance(schema, list) else schema.values() if isinstance(schema, dict) else ():
        _fail_fast(node)
    if isinstance(schema, dict) and schema.get("type") in ("list", "tuple"):
        schema["fail_fast"] = True


class Strict(BaseModel):
    """No unknown field is dropped in silence, and nothing is converted: "4" and true are no numbers."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """A list is left at its first mistake: only one is told, and millions would take minutes to collect."""
        schema = handler(source)
        _fail_fast(schema)
        return schema

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, data: Any) -> Any:
        if isinstance(data, dict) and len(data) > MAX_FIELDS:
            raise ValueError(f"one object has at most {MAX_FIELDS} fields, not {len(data)}")
        return data


class ConfigLoader(yaml.SafeLoader):
    """YAML as its readers expect it: 1e-3 is a number, though YAML 1.1 wants 1.0e-3."""


ConfigLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_config(path: Path, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
    """What a YAML file says, with dotted overrides, not validated. Raises UserError for a file that says nothing clear."""
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=ConfigLoader)
    except OSError as error:
        raise UserError(f"cannot read the config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    data = {} if data is None else data
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise UserError(f"{path} must hold a mapping from the names of options to their values")
    for key, value in (overrides or {}).items():
        _set(data, key, value)
    return data


def parse_options(model: type[OptionsT], data: dict[str, Any]) -> OptionsT:
    """Validate `data` as `model`. Raises UserError with the first mistake: the field, its value and what is allowed."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise UserError(explain(error, model), param=dotted(error.errors()[0]["loc"]) or None) from error


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """The first mistake of a validation, for people: `learning_rate: input should be greater than 0 (got -1.0)`.

    One of several fields together names them itself.
    """
    first = error.errors()[0]
    field = dotted(first["loc"])
    if first["type"] == "extra_forbidden":
        return f"{field}: unknown field; {known_fields(model, first['loc'])}"
    message = first["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if first["type"] == "missing":
        return f"{field}: this field is required"
    if not field:
        return message
    return f"{field}: {message}" + ("" if first["type"] == SECRET else f" (got {first['input']!r:.200})")


def known_fields(model: type[BaseModel], location: tuple[str | int, ...]) -> str:
    """What may stand where an unknown field stood: the nearest name first, then all of them."""
    for part in location[:-1]:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part)
        inner = None if field is None else _model_in(field.annotation)
        if inner is None:
            return "remove it"
        model = inner
    names = list(model.model_fields)
    near = difflib.get_close_matches(str(location[-1]), names, n=1)
    return (f"did you mean {near[0]}? " if near else "") + f"known are {', '.join(names)}"


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model that a field holds, by itself, in a list, or beside other things."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_in(part)) is not None), None)


def dotted(location: tuple[str | int, ...]) -> str:
    return ".".join(str(part) for part in location)


def _set(data: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            raise UserError(f"{key}: {parent} is not a group of options", param=key)
    data[last] = value

"""Reading one group of keys by its table: unknown keys, values that are refused, notes for what is mapped."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lm.errors import UserError
from trainer.torchtune.component import Component
from trainer.torchtune.components import COMPONENTS, REFUSED
from trainer.torchtune.keys import Key
from trainer.torchtune.models import FAMILIES, PREFIX
from trainer.torchtune.overrides import COMPONENT


@dataclass(slots=True)
class Collected:
    """What a configuration has come to so far."""

    options: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    """Our option -> the field that said it, as the user wrote it."""
    notes: list[str] = field(default_factory=list)

    def set(self, option: str, value: Any, origin: str) -> None:
        self.options[option] = value
        self.origins[option] = origin

    def note(self, where: str, text: str) -> None:
        self.notes.append(f"{where}: {text}")

    def read(self, group: Mapping[str, Any], keys: Mapping[str, Key], where: str = "") -> None:
        """Go through `group` by its table. Raises UserError for unknown keys and refused values."""
        for name, value in group.items():
            if name == COMPONENT:
                continue
            path = f"{where}.{name}" if where else name
            if name not in keys:
                raise UserError(f"{path}: unknown key; {nearest(name, keys)}", param=path)
            self._read_key(keys[name], value, path)

    def _read_key(self, key: Key, value: Any, path: str) -> None:
        if key.option is not None:
            self.set(key.option, value, path)
        if key.is_silent(value) or key.is_a("honoured"):
            return
        if key.is_a("refused"):
            raise UserError(f"{path}: {key.text} (got {value!r:.80})", param=path)
        self.note(path, f"{key.text} (got {value!r:.80})")


def nearest(name: str, names: Iterable[str]) -> str:
    names = list(names)
    near = difflib.get_close_matches(name[:80], names, n=1)
    return (f"did you mean {near[0]}? " if near else "") + f"known are {', '.join(names) or 'none here'}"


def component_of(place: str, group: object, where: str | None = None) -> tuple[str, Component, dict[str, Any]]:
    """Name, table and keys of the component of the kind `place`, at `where` if that is called otherwise.

    Raises UserError for a name that is not in the list.
    """
    where = where or place
    param = f"{where}.{COMPONENT}"
    if not isinstance(group, dict):
        raise UserError(f"{where}: a mapping with {COMPONENT} is expected (got {group!r:.80})", param=where)
    if COMPONENT not in group:
        raise UserError(f"{param}: this field is required; {nearest('', COMPONENTS[place])}", param=param)
    name = group[COMPONENT]
    if not isinstance(name, str):
        raise UserError(f"{param}: the name of a component is expected (got {name!r:.80})", param=param)
    if name not in COMPONENTS[place]:
        reason = f"{name:.120}: {REFUSED[name]}" if name in REFUSED else f"{name!r:.120} is not in the list"
        family = name.removeprefix(PREFIX).split(".")[0]
        if name.startswith(PREFIX) and family not in FAMILIES:
            raise UserError(f"{param}: {name:.120}: no such family is supported; {nearest('', FAMILIES)}", param=param)
        raise UserError(f"{param}: {reason}; {nearest(name, COMPONENTS[place])}", param=param)
    return name, COMPONENTS[place][name], group


def text_at(group: Mapping[str, Any], name: str, where: str) -> str:
    """The text at `where`.`name`. Raises UserError where it is missing or something else."""
    path, value = f"{where}.{name}", group.get(name)
    if value is None:
        raise UserError(f"{path}: this field is required", param=path)
    if not isinstance(value, str) or not value or "\0" in value:
        raise UserError(f"{path}: a text is expected (got {value!r:.80})", param=path)
    return value


def texts_at(group: Mapping[str, Any], name: str, where: str) -> list[str]:
    """One text, or a list of them."""
    value = group.get(name)
    items = value if isinstance(value, list) and value else [value]
    return [text_at({name: item}, name, where) for item in items]


def in_users_words(error: UserError, origins: Mapping[str, str]) -> UserError:
    """`error` about one of our options, about the key that the user wrote instead."""
    param = error.param or ""
    option = max((name for name in origins if param == name or param.startswith(f"{name}.")), key=len, default=None)
    if option is None:
        return error
    inner = param.removeprefix(option)
    return UserError(f"{origins[option]}{str(error).removeprefix(option)}", param=origins[option] + inner)

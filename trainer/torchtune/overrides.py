"""What OmegaConf does to a configuration for torchtune: key=value and ~key overrides, and ${...}."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterable
from typing import Any

from lm.errors import UserError
from trainer.torchtune.reading import join, parse_yaml

COMPONENT = "_component_"
MAX_STEPS = 5_000
MAX_TEXT = 65_536

_innermost = re.compile(r"\$\{([^${}]*)\}")
_path = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*")


def apply_overrides(data: dict[str, Any], words: Iterable[str]) -> dict[str, Any]:
    """`data` with `a.b=value` set (the value is read as YAML) and `~a.b` removed, in that order as torchtune does.

    A component may be named for short: `optimizer=torch.optim.AdamW` keeps its other keys. Raises UserError.
    """
    data = copy.deepcopy(data)
    words = list(words)
    for word in (word for word in words if not word.startswith("~")):
        key, equals, text = word.partition("=")
        if not equals or not key or key.startswith("-"):
            raise UserError(f"unknown argument {word!r:.80}; options are written as key=value, or ~key to remove one")
        _set(data, key, parse_value(key, text))
    for word in (word for word in words if word.startswith("~")):
        _remove(data, word[1:])
    return data


def parse_value(key: str, text: str) -> Any:
    """What stands behind `key=` on the command line. Raises UserError."""
    try:
        return parse_yaml(f"value: {text}")["value"]
    except UserError as error:
        try:  # as a block of its own: `value: a: b` is no YAML, and neither is it meant as a mapping
            return parse_yaml("value:\n  " + text.replace("\n", "\n  "))["value"]
        except UserError:
            raise UserError(f"{key}: {text!r:.200} cannot be read: {error}", param=key) from error


def _set(data: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            raise UserError(f"{key}: {parent} is not a group of options", param=key)
    old = data.get(last)
    if isinstance(old, dict) and COMPONENT in old and isinstance(value, str):
        old[COMPONENT] = value
    else:
        data[last] = value


def _remove(data: dict[str, Any], key: str) -> None:
    *parents, last = key.split(".")
    group: Any = data
    for parent in parents:
        group = group.get(parent) if isinstance(group, dict) else None
    if not isinstance(group, dict) or last not in group:
        raise UserError(f"~{key}: there is no {key!r:.80} to remove{_known(data, key)}", param=key)
    del group[last]


def interpolate(data: dict[str, Any]) -> dict[str, Any]:
    """`data` with every ${a.b} replaced by the value of that name, from the top; nested ones, inner first.

    `${output_dir}` without such a key means `checkpointer.output_dir`. Raises UserError for unknown names, for circles
    and for OmegaConf's resolvers such as ${oc.env:HOME}, which would read what is not in the file.
    """
    resolved = _Resolver(data).resolve(data, "", ())
    assert isinstance(resolved, dict)
    return resolved


class _Resolver:
    def __init__(self, data: dict[str, Any]) -> None:
        self._data = data
        self._steps = 0

    def resolve(self, value: Any, where: str, visiting: tuple[str, ...]) -> Any:
        """`where` is the name of what is being resolved; `visiting` are the names that led here."""
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise UserError(f"{where}: this much cannot be put in for ${{...}}", param=where)
        if isinstance(value, dict):
            return {key: self.resolve(item, join(where, key), visiting) for key, item in value.items()}
        if isinstance(value, list):
            return [self.resolve(item, join(where, str(i)), visiting) for i, item in enumerate(value)]
        return self._text(value, where, visiting) if isinstance(value, str) and "${" in value else value

    def _text(self, text: str, where: str, visiting: tuple[str, ...]) -> Any:
        while match := _innermost.search(text):
            value = self._named(match[1].strip(), where, visiting)
            if match[0] == text:
                return value
            if isinstance(value, dict | list):
                raise UserError(f"{where}: {match[0]} is no text that could stand within a text", param=where)
            text = text[: match.start()] + _as_text(value) + text[match.end() :]
            self._steps += 1
            if len(text) > MAX_TEXT or self._steps > MAX_STEPS:
                raise UserError(f"{where}: it becomes too long with what ${{...}} means", param=where)
        if "${" in text:
            raise UserError(f"{where}: {text!r:.80} has a ${{ that is not closed", param=where)
        return text

    def _named(self, name: str, where: str, visiting: tuple[str, ...]) -> Any:
        if ":" in name or not _path.fullmatch(name):
            raise UserError(
                f"{where}: ${{{name:.80}}} is not read: only names of this file are, as in ${{output_dir}} or "
                "${checkpointer.output_dir}",
                param=where,
            )
        if name in visiting or len(visiting) > 50:
            raise UserError(f"{where}: ${{{name:.80}}} goes in a circle: {' -> '.join((*visiting, name))}", param=where)
        return self.resolve(self._look_up(name, where), where, (*visiting, name))

    def _look_up(self, name: str, where: str) -> Any:
        value: Any = self._data
        if name == "output_dir" and name not in self._data and isinstance(self._data.get("checkpointer"), dict):
            name = "checkpointer.output_dir"
        for part in name.split("."):
            if isinstance(value, dict) and part in value:
                value = value[part]
            elif isinstance(value, list) and part.isdecimal() and int(part[:9]) < len(value):
                value = value[int(part[:9])]
            else:
                raise UserError(
                    f"{where}: ${{{name:.80}}}: there is no {name:.80} in the configuration{_known(self._data, name)}",
                    param=where,
                )
        return value


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else str(value)


def _known(data: dict[str, Any], name: str) -> str:
    near = difflib.get_close_matches(name, [*data], n=1)
    return f"; did you mean {near[0]}?" if near else f"; at its top are {', '.join(data) or 'no keys'}"

"""YAML text that anybody may send, as plain data: bounded in size and depth, without aliases, tags and doubled keys."""

from __future__ import annotations

from collections import Counter
from typing import Any

import yaml
from yaml.nodes import MappingNode

from lm.errors import UserError
from trainer.strict import ConfigLoader

MAX_CHARACTERS = 64 << 10
MAX_DEPTH = 20
MAX_NODES = 10_000
LARGEST_NUMBER = 2**63 - 1
"""Beyond it are only numbers that cannot be meant; Python does not even write out the largest of them."""


class PlainLoader(ConfigLoader):
    """A key that stands twice is an error, as in OmegaConf."""

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Any, Any]:
        counts = Counter(key.value for key, _ in node.value if isinstance(key.value, str))
        if doubled := [key for key, count in counts.items() if count > 1]:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {doubled[0]!r:.80} stands there twice", node.start_mark
            )
        return super().construct_mapping(node, deep=deep)


def parse_yaml(text: str, *, name: str = "config") -> dict[str, Any]:
    """The mapping that `text` holds. Raises UserError that calls it `name`."""
    if len(text) > MAX_CHARACTERS:
        raise UserError(f"{name}: {len(text)} characters are too many; at most {MAX_CHARACTERS}", param=name)
    try:
        _check_events(text, name)
        data = yaml.load(text, Loader=PlainLoader)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError, LookupError, AttributeError) as error:
        # The last two: PyYAML's own constructors, for a tag with a value that is none of its kind
        if isinstance(error, UserError):
            raise
        message = " ".join(str(error).split())
        raise UserError(f"{name} is not valid YAML: {message:.500}", param=name) from error
    return check_plain(data, name=name)


def _check_events(text: str, name: str) -> None:
    """Before anything is built: few enough nodes, flat enough, and no alias, with which a few lines make millions."""
    depth = nodes = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            line = f"line {event.start_mark.line + 1}: " if event.start_mark else ""
            raise UserError(
                f"{name}: {line}YAML aliases (*{event.anchor:.40}) are not read; write the value out, or use ${{...}}",
                param=name,
            )
        nodes += isinstance(event, yaml.NodeEvent)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH or nodes > MAX_NODES:
            what = f"nested deeper than {MAX_DEPTH}" if depth > MAX_DEPTH else f"more than {MAX_NODES} values"
            raise UserError(f"{name}: {what}; no configuration is that large", param=name)


def check_plain(data: object, *, name: str = "config") -> dict[str, Any]:
    """`data`, once it is known to be a mapping of plain values. Raises UserError. None counts as an empty mapping."""
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UserError(f"{name} must hold a mapping from names to values (got {data!r:.80})", param=name)
    left = MAX_NODES
    stack: list[tuple[object, str, int]] = [(data, "", 0)]
    while stack:
        value, where, depth = stack.pop()
        left -= 1
        if left < 0 or depth > MAX_DEPTH:
            raise UserError(f"{name}: it is too large or nested too deeply", param=name)
        stack.extend((inner, join(where, key), depth + 1) for key, inner in _children(value, where, name))
    return data


def _children(value: object, where: str, name: str) -> list[tuple[str, object]]:
    if isinstance(value, dict):
        strange = next((key for key in value if not isinstance(key, str)), None)
        if strange is not None or None in value:
            raise UserError(f"{where or name}: the key {strange!r:.80} is no text; quote it", param=where or name)
        for key in value:
            _check_text(key, where or name)
        return list(value.items())
    if isinstance(value, list):
        return [(str(index), item) for index, item in enumerate(value)]
    if isinstance(value, str):
        _check_text(value, where)
    if isinstance(value, int) and not -LARGEST_NUMBER <= value <= LARGEST_NUMBER:
        raise UserError(f"{where}: a number beyond {LARGEST_NUMBER}; no option is that large", param=where)
    if value is None or isinstance(value, str | bool | int | float):
        return []
    raise UserError(
        f"{where}: {value!r:.80} is neither text, number, true, false, null, list nor mapping; quote it", param=where
    )


def _check_text(text: str, where: str) -> None:
    """Half of a surrogate pair, which an escape of YAML or JSON can make, could be written nowhere."""
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f"{where}: {text!a:.80} is no text that could be written as UTF-8", param=where)


def join(where: str, key: str) -> str:
    """The dotted name of `key` within `where`, which is empty at the top."""
    return f"{where}.{key}" if where else key

"""Typed, checked access to the JSON objects that describe a model. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm.errors import UserError


def read_json_object(path: Path) -> dict[str, Any]:
    """Raises UserError, naming the file, when it cannot be read or holds something else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} must hold a JSON object, not {type(data).__name__}")
    return data


@dataclass(frozen=True, slots=True)
class Fields:
    """The values of `data` by key; null counts as missing. `prefix` stands before a key in messages.

    Every reader raises UserError naming the key, its value and what it must be.
    """

    data: Mapping[str, Any]
    prefix: str = ""

    def wrong(self, key: str, wanted: str) -> UserError:
        name = self.prefix + key
        if key not in self.data:
            return UserError(f"{name}: this key is required and missing; it must be {wanted}", param=name)
        return UserError(f"{name}: must be {wanted} (got {self.data[key]!r:.200})", param=name)

    def size(self, key: str, default: int | None = None) -> int:
        value = self.value(key, default)
        if not is_count(value) or value < 1:
            raise self.wrong(key, "a positive integer")
        return int(value)

    def count(self, key: str) -> int:
        value = self.value(key)
        if not is_count(value):
            raise self.wrong(key, "an integer of 0 or more")
        return int(value)

    def number(self, key: str, default: float | None = None) -> float:
        value = self.value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise self.wrong(key, "a positive number")
        return float(value)

    def number_or_none(self, key: str) -> float | None:
        """A zero counts as missing, as in transformers."""
        return self.number(key) if self.data.get(key) else None

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.value(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def one_of(self, key: str, allowed: tuple[str, ...], default: str | None) -> str:
        value = self.value(key, default)
        if value not in allowed:
            raise self.wrong(key, f"one of the supported {list(allowed)}")
        return str(value)

    def token_id(self, key: str) -> int | None:
        value = self.data.get(key)
        if value is None or is_count(value):
            return value
        raise self.wrong(key, "a token id or null")

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One id or a list of them, each once."""
        value = self.data.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(map(is_count, ids)):
            raise self.wrong(key, "a token id, a list of them or null")
        return tuple(dict.fromkeys(ids))

    def value(self, key: str, default: Any = None) -> Any:
        value = self.data.get(key)
        return default if value is None else value


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0

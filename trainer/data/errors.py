"""Mistakes in training data, and the words in which they are told. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Iterable

from lm.errors import UserError

MAX_RECORD_BYTES = 4 << 20
MAX_COLUMNS = 1000


class DataError(UserError):
    """A mistake in training data. The message says which record, and in a file also the line."""


def kind(value: object) -> str:
    """A JSON value's type in JSON's words, with the value where it is short: `number 3`."""
    if value is None:
        return "null"
    names: dict[type, str] = {
        bool: "boolean",
        int: "number",
        float: "number",
        str: "string",
        list: "list",
        dict: "object",
    }
    name = names.get(type(value), type(value).__name__)
    return name if isinstance(value, list | dict) else f"{name} {json.dumps(value, default=str):.40}"


def quoted(names: Iterable[object]) -> str:
    return ", ".join(f'"{name!s:.40}"' for name in names)


def decoded(data: bytes, name: str, line: int) -> str:
    """UTF-8 bytes that begin on `line` of the file `name`, as text. Raises DataError with the line of a bad byte."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        bad = data[error.start : error.start + 1].hex()
        raise DataError(f"{name}, line {line}: byte 0x{bad} is not UTF-8; save the file as UTF-8") from error


def check_size(size: int, where: str) -> None:
    if size > MAX_RECORD_BYTES:
        raise DataError(f"{where}: longer than {MAX_RECORD_BYTES >> 20} MiB, the most that one record may be")


def check_columns(names: list[str], name: str, where: str) -> None:
    """Raises DataError for column names of a table that cannot be told apart."""
    if len(names) > MAX_COLUMNS:
        raise DataError(f"{name}: {len(names)} columns, more than {MAX_COLUMNS}, the most that a file may have")
    twice = [column for column in dict.fromkeys(names) if names.count(column) > 1]
    if twice:
        raise DataError(f"{name}{where}: the column {quoted(twice[:1])} is there twice; rename one of them")

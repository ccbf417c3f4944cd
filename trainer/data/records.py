"""Training records as users write them: read, checked, and brought into the one form that is trained on. Torch-free.

A record is {"input": str, "output": str} or {"messages": [{"role": str, "content": str}, ...]}. A data file is a JSON
list of records, or JSONL: one record a line. Both kinds become chat messages, so that training and serving share the
chat template. Knows no tokenizer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm.errors import UserError
from lm.template import check_messages

Messages = list[dict[str, str]]

MAX_RECORD_BYTES = 4 << 20
INSTRUCT_COLUMNS = ("input", "output")
COLUMNS = f'a record needs the columns "{INSTRUCT_COLUMNS[0]}" and "{INSTRUCT_COLUMNS[1]}", or "messages"'
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

_whitespace = re.compile(r"[ \t\r\n]*")


class DataError(UserError):
    """A mistake in training data. The message says which record, and in a file also the line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One record of a data file, checked."""

    messages: Messages
    where: str
    """Where it stands, for error messages: `train.jsonl, record 3 (line 5)`."""
    unused_columns: tuple[str, ...]
    """Columns of the file that training does not look at."""


def read_records(path: Path, *, name: str | None = None) -> Iterator[Record]:
    """The records of a JSON or JSONL file, one at a time; a JSONL file is never in memory as a whole.

    `name` is what error messages call the file (default: its own name). Raises DataError, also for a file without
    records.
    """
    name = name or path.name
    number = 0
    for number, (line, value) in enumerate(_read_values(path, name), start=1):
        where = f"{name}, record {number} (line {line})"
        messages = to_messages(value, where)
        unused = tuple(key for key in value if key not in ("messages", *INSTRUCT_COLUMNS))
        yield Record(messages=messages, where=where, unused_columns=unused)
    if number == 0:
        raise DataError(f"{name} holds no records: {COLUMNS}")


def check_records(records: Iterable[object], *, param: str) -> None:
    """Check records that came in a request. Raises DataError for none at all, and for the first bad one.

    The message counts records from 1; the error's `param` is `param` and the index in the list, from 0.
    """
    number = 0
    for number, record in enumerate(records, start=1):
        to_messages(record, f"{param}, record {number}", param=f"{param}.{number - 1}")
    if number == 0:
        raise DataError(f"{param} holds no records: {COLUMNS}", param=param)


def to_messages(record: object, where: str, *, param: str | None = None) -> Messages:
    """The chat messages of one record. Raises DataError that begins with `where`."""
    if not isinstance(record, dict):
        raise DataError(f"{where}: must be an object, not {_kind(record)}; {COLUMNS}", param=param)
    missing = [column for column in INSTRUCT_COLUMNS if column not in record]
    if "messages" in record:
        if len(missing) < len(INSTRUCT_COLUMNS):
            raise DataError(f'{where}: has "messages" beside "input" or "output"; keep one of the two', param=param)
        return _checked_messages(record["messages"], where, param)
    if missing:
        lacks, found = _quoted(missing), _quoted(list(record)) or "no column"
        raise DataError(f"{where}: {COLUMNS}; {lacks} is missing, found {found}", param=param)
    prompt, answer = (_text(record[column], f'{where}: "{column}"', param) for column in INSTRUCT_COLUMNS)
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _checked_messages(messages: Any, where: str, param: str | None) -> Messages:
    try:
        check_messages(messages)
    except UserError as error:
        raise DataError(f"{where}: {error}", param=param) from error
    if all(message["role"] != "assistant" for message in messages):
        raise DataError(f'{where}: no message has the role "assistant", so there is nothing to learn', param=param)
    for index, message in enumerate(messages):
        _text(message["content"], f"{where}: messages[{index}].content", param)
    return list(messages)


def _text(value: object, what: str, param: str | None) -> str:
    if not isinstance(value, str):
        raise DataError(f"{what} must be a string, not {_kind(value)}", param=param)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x}"
        raise DataError(
            f"{what} has half of a surrogate pair ({half}) at character {error.start}", param=param
        ) from None
    return value


def _kind(value: object) -> str:
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
    return name if isinstance(value, list | dict) else f"{name} {json.dumps(value):.40}"


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f'"{name:.40}"' for name in names)


# ---- files: JSON values with the line on which each begins


def _read_values(path: Path, name: str) -> Iterator[tuple[int, Any]]:
    try:
        with path.open("rb") as file:
            start = file.read(1024)
            file.seek(len(BYTE_ORDER_MARK) if start.startswith(BYTE_ORDER_MARK) else 0)
            is_list = start.removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b"[")
            yield from _list_values(file.read(), name) if is_list else _line_values(file, name)
    except OSError as error:
        raise DataError(f"cannot read the data file {name}: {error.strerror}") from error


def _line_values(file: Any, name: str) -> Iterator[tuple[int, Any]]:
    number = 0
    lines = iter(lambda: file.readline(MAX_RECORD_BYTES + 1), b"")
    for line, data in enumerate(lines, start=1):
        text = data.strip()
        if not text:
            continue
        number += 1
        _check_size(len(text), f"{name}, record {number} (line {line})")
        yield line, _parse_line(_decoded(text, name, line), f"{name}, record {number}", line)


def _parse_line(text: str, where: str, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        hint = "in a JSONL file every line is one whole record"
        raise DataError(f"{where} (line {line}, column {error.colno}): broken JSON: {error.msg}; {hint}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} (line {line}): unreadable JSON: {error}") from error


def _list_values(data: bytes, name: str) -> Iterator[tuple[int, Any]]:
    """The elements of a JSON list, decoded one by one, so that only the text is in memory as a whole."""
    text = _decoded(data, name, 1)
    position = _skip(text, text.index("[") + 1)
    line, counted, number = 1, 0, 0
    ended = text.startswith("]", position)
    while not ended:
        number += 1
        line += text.count("\n", counted, position)
        counted = position
        value, end = _parse_element(text, position, f"{name}, record {number}", line)
        _check_size(end - position, f"{name}, record {number} (line {line})")
        yield line, value
        position = _skip(text, end)
        ended = text.startswith("]", position)
        if not ended and not text.startswith(",", position):
            place = _place(text, position)
            raise DataError(f"{name} ({place}): broken JSON: expected a comma or ] after record {number}")
        position = position if ended else _skip(text, position + 1)
    if _skip(text, position + 1) < len(text):
        place = _place(text, _skip(text, position + 1))
        raise DataError(f"{name} ({place}): broken JSON: text after the end of the list")


def _parse_element(text: str, position: int, where: str, line: int) -> tuple[Any, int]:
    try:
        return json.JSONDecoder().raw_decode(text, position)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} (line {error.lineno}, column {error.colno}): broken JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} (line {line}): unreadable JSON: {error}") from error


def _skip(text: str, position: int) -> int:
    found = _whitespace.match(text, position)
    return found.end() if found else position


def _place(text: str, position: int) -> str:
    line_start = text.rfind("\n", 0, position) + 1
    return f"line {text.count(chr(10), 0, position) + 1}, column {position - line_start + 1}"


def _decoded(data: bytes, name: str, line: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        bad = data[error.start : error.start + 1].hex()
        raise DataError(f"{name}, line {line}: byte 0x{bad} is not UTF-8; save the file as UTF-8") from error


def _check_size(size: int, where: str) -> None:
    if size > MAX_RECORD_BYTES:
        raise DataError(f"{where}: longer than {MAX_RECORD_BYTES >> 20} MiB, the most that one record may be")

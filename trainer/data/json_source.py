"""JSON data files: a list of records, or JSONL, a record a line. Torch-free.

Values come with the line on which each begins. A JSONL file is never in memory as a whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from trainer.data.errors import MAX_RECORD_BYTES, DataError, check_size, decoded

_whitespace = re.compile(r"[ \t\r\n]*")


def json_values(file: BinaryIO, name: str) -> Iterator[tuple[int, Any]]:
    """From the file's position to its end. Raises DataError that names the file, the record and the line."""
    start = file.tell()
    is_list = file.read(1024).lstrip().startswith(b"[")
    file.seek(start)
    yield from _list_values(file.read(), name) if is_list else _line_values(file, name)


def _line_values(file: BinaryIO, name: str) -> Iterator[tuple[int, Any]]:
    number = 0
    lines = iter(lambda: file.readline(MAX_RECORD_BYTES + 1), b"")
    for line, data in enumerate(lines, start=1):
        text = data.strip()
        if not text:
            continue
        number += 1
        check_size(len(text), f"{name}, record {number} (line {line})")
        yield line, _parse_line(decoded(text, name, line), f"{name}, record {number}", line)


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
    text = decoded(data, name, 1)
    position = _skip(text, text.index("[") + 1)
    line, counted, number = 1, 0, 0
    ended = text.startswith("]", position)
    while not ended:
        number += 1
        line += text.count("\n", counted, position)
        counted = position
        value, end = _parse_element(text, position, f"{name}, record {number}", line)
        check_size(end - position, f"{name}, record {number} (line {line})")
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

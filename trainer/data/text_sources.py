"""Data files of lines: CSV, a table whose first line names the columns, and plain text. Torch-free, and streamed."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import Any, BinaryIO

from trainer.data.errors import MAX_RECORD_BYTES, DataError, check_columns, check_size, decoded


def csv_values(file: BinaryIO, name: str) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows under the header, each with the line on which it begins; blank lines are passed over.

    A quoted field may hold commas, newlines and doubled quotes. Raises DataError with the record and the line.
    """
    csv.field_size_limit(MAX_RECORD_BYTES)  # the module's own limit, 128 KiB, is less than a long conversation
    rows = csv.reader(_lines(file, name), strict=True)
    header = _next_row(rows, name, "the header") or []
    _check_header(header, name)
    number, line = 0, rows.line_num + 1
    while (row := _next_row(rows, name, f"record {number + 1}")) is not None:
        if row:
            number += 1
            yield line, _record(header, row, f"{name}, record {number} (line {line})")
        line = rows.line_num + 1


def text_values(file: BinaryIO, name: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Each line that is not blank as a record {"text": line}."""
    for number, line in enumerate(_lines(file, name), start=1):
        if text := line.rstrip("\r\n"):
            check_size(len(text.encode()), f"{name}, line {number}")
            if not text.isspace():
                yield number, {"text": text}


def _lines(file: BinaryIO, name: str) -> Iterator[str]:
    lines = iter(lambda: file.readline(MAX_RECORD_BYTES + 1), b"")
    for number, data in enumerate(lines, start=1):
        check_size(len(data), f"{name}, line {number}")
        yield decoded(data, name, number)


def _next_row(rows: Any, name: str, what: str) -> list[str] | None:
    """The next row, [] for a blank line, None at the end. `rows` is a csv.reader."""
    before = rows.line_num + 1
    try:
        row: list[str] | None = next(rows, None)
    except csv.Error as error:
        hint = "quote a field that holds a comma, a quote or a newline, and double the quotes in it"
        raise DataError(f"{name}, {what} (line {before}): broken CSV: {error}; {hint}") from error
    return row


def _check_header(header: list[str], name: str) -> None:
    hint = "the first line of a CSV file names its columns"
    if not header:
        raise DataError(f"{name} (line 1): the header is missing; {hint}")
    check_columns(header, name, " (line 1)")
    if "" in header[:-1]:
        raise DataError(f"{name} (line 1): column {header.index('') + 1} has no name; {hint}")


def _record(header: list[str], row: list[str], where: str) -> dict[str, str]:
    if len(row) != len(header):
        hint = "quote fields that hold a comma or a newline"
        raise DataError(f"{where}: {len(row)} fields, but the header names {len(header)} columns; {hint}")
    check_size(sum(len(field.encode()) for field in row), where)
    return dict(zip(header, row, strict=True))

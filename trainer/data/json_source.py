"""JSON data files: a list of records, or JSONL, a record a line. Torch-free.

Values come with the line on which each begins. No file is ever in memory as a whole.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from trainer.data.errors import MAX_RECORD_BYTES, DataError, check_size, decoded

BLOCK_BYTES = 1 << 20
_whitespace = re.compile(r"[ \t\r\n]*")
_of_numbers = re.compile(r"[-+.eE0-9]*")


def json_values(file: BinaryIO, name: str) -> Iterator[tuple[int, Any]]:
    """From the file's position to its end. Raises DataError that names the file, the record and the line."""
    start = file.tell()
    is_list = file.read(1024).lstrip().startswith(b"[")
    file.seek(start)
    yield from _list_values(file, name) if is_list else _line_values(file, name)


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


def _list_values(file: BinaryIO, name: str) -> Iterator[tuple[int, Any]]:
    """The elements of a JSON list, one by one."""
    text = _Window(file, name)
    text.skip_space()
    text.position += 1  # the bracket
    text.skip_space()
    number, ended = 0, text.next() == "]"
    while not ended:
        number += 1
        line = text.mark()
        yield line, _element(text, f"{name}, record {number}", line)
        text.skip_space()
        ended = text.next() == "]"
        if not ended and text.next() != ",":
            raise DataError(f"{name} ({text.here()}): broken JSON: expected a comma or ] after record {number}")
        if not ended:
            text.position += 1
            text.skip_space()
    text.position += 1
    text.skip_space()
    if text.next():
        raise DataError(f"{name} ({text.here()}): broken JSON: text after the end of the list")


class _Window:
    """The part of a file of text that is looked at, from `position` on. What is behind is forgotten."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file, self._name = file, name
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._mark, self._line, self._column = 0, 1, 1  # a position, and where it stands
        self._lines_read = 1
        self.text, self.position = "", 0
        self.at_end = False

    def more(self) -> None:
        """Read on. Raises DataError with the line of a byte that is not UTF-8."""
        self.mark()
        data = self._file.read(BLOCK_BYTES)
        self.at_end = not data
        try:
            block = self._decoder.decode(data, final=self.at_end)
        except UnicodeDecodeError as error:
            decoded(error.object, self._name, self._lines_read)  # says where
            raise
        self._lines_read += block.count("\n")
        self.text = self.text[self.position :] + block
        self.position = self._mark = 0

    def next(self) -> str:
        """The next character; empty at the end."""
        return self.text[self.position : self.position + 1]

    def skip_space(self) -> None:
        """Go to the next character that is no white space."""
        while True:
            found = _whitespace.match(self.text, self.position)
            self.position = found.end() if found else self.position
            if self.position < len(self.text) or self.at_end:
                return
            self.more()

    def place(self, position: int) -> tuple[int, int]:
        """Line and column, from 1, of a position that is not before the last mark."""
        lines = self.text.count("\n", self._mark, position)
        if lines == 0:
            return self._line, self._column + position - self._mark
        return self._line + lines, position - self.text.rfind("\n", self._mark, position)

    def mark(self) -> int:
        """Count lines from here on; which one this is."""
        self._line, self._column = self.place(self.position)
        self._mark = self.position
        return self._line

    def may_go_on(self, value: Any, end: int) -> bool:
        """Whether a value that ends at `end` may be the beginning of one that the next block continues."""
        found = _of_numbers.match(self.text, end)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and found is not None and found.end() == len(self.text)

    def here(self) -> str:
        line, column = self.place(self.position)
        return f"line {line}, column {column}"


def _element(text: _Window, where: str, line: int) -> Any:
    """The value that begins at the window's position, which goes behind it."""
    while True:
        mistake: json.JSONDecodeError | None = None
        value, end = None, text.position
        try:
            value, end = json.JSONDecoder().raw_decode(text.text, text.position)
        except json.JSONDecodeError as error:
            mistake = error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} (line {line}): unreadable JSON: {error}") from error
        size = (end if mistake is None else len(text.text)) - text.position
        if mistake is None and (text.at_end or not text.may_go_on(value, end)):
            check_size(size, f"{where} (line {line})")
            text.position = end
            return value
        if text.at_end or size > MAX_RECORD_BYTES:
            break
        text.more()  # the value may go on there
    is_open = mistake is None or "Unterminated" in mistake.msg or mistake.pos - text.position > MAX_RECORD_BYTES
    if not text.at_end and is_open:
        check_size(size, f"{where} (line {line})")
    assert mistake is not None
    line, column = text.place(mistake.pos)
    raise DataError(f"{where} (line {line}, column {column}): broken JSON: {mistake.msg}") from mistake

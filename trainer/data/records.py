"""Training records as users write them: read, checked, and brought into the form that is trained on. Torch-free.

A data file is JSON, JSONL, CSV, Parquet or text (sources.py), its records have one of five forms (formats.py). All but
plain text become chat messages, so that training and serving share the chat template. Knows no tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from trainer.data.errors import DataError, kind
from trainer.data.formats import (
    COLUMNS,
    CONVERTERS,
    Messages,
    RecordReader,
    check_has_columns,
    find_format,
    used_columns,
    with_prompts,
)
from trainer.data.options import ReadOptions
from trainer.data.sources import read_values

DEFAULT_OPTIONS = ReadOptions()


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One record of a data file, checked."""

    messages: Messages
    """Empty where there is `text`."""
    where: str
    """Where it stands, for error messages: `train.jsonl, record 3 (line 5)`."""
    unused_columns: tuple[str, ...]
    """Columns of the file that training does not look at."""
    text: str | None = None
    """Text without turns, trained as it is."""
    data_format: str = "messages"
    """Which form it was written in."""


def read_records(path: Path, *, name: str | None = None, options: ReadOptions = DEFAULT_OPTIONS) -> Iterator[Record]:
    """The records of a data file, one at a time; files of lines and Parquet are never in memory as a whole.

    `name` is what error messages call the file (default: its own name). Raises DataError, also for a file without
    records.
    """
    name = name or path.name
    number = 0
    for number, (place, value) in enumerate(read_values(path, name, options), start=1):
        yield to_record(value, f"{name}, record {number} ({place})", options=options)
    if number == 0:
        raise DataError(f"{name} holds no records: {COLUMNS}")


def check_records(records: Iterable[object], *, param: str, options: ReadOptions = DEFAULT_OPTIONS) -> None:
    """Check records that came in a request. Raises DataError for none at all, and for the first bad one.

    The message counts records from 1; the error's `param` is `param` and the index in the list, from 0.
    """
    number = 0
    for number, record in enumerate(records, start=1):
        to_record(record, f"{param}, record {number}", param=f"{param}.{number - 1}", options=options)
    if number == 0:
        raise DataError(f"{param} holds no records: {COLUMNS}", param=param)


def to_record(
    record: object, where: str, *, param: str | None = None, options: ReadOptions = DEFAULT_OPTIONS
) -> Record:
    """One value of a file, checked and converted. Raises DataError that begins with `where`."""
    if not isinstance(record, dict):
        raise DataError(f"{where}: must be an object, not {kind(record)}; {COLUMNS}", param=param)
    data_format = find_format(record, options, where, param)
    check_has_columns(record, data_format, options, where, param)
    reader = RecordReader(record, options, where, param)
    text = _plain_text(reader) if data_format == "text" else None
    messages = with_prompts(CONVERTERS[data_format](reader), options) if text is None else []
    used = used_columns(data_format, options)
    unused = (*(key for key in record if key not in used), *reader.unused_fields)
    return Record(messages=messages, where=where, unused_columns=unused, text=text, data_format=data_format)


def _plain_text(reader: RecordReader) -> str:
    text = reader.text("text")
    for option in ("new_system_prompt", "prompt_template"):
        if getattr(reader.options, option) is not None:
            raise DataError(f"{reader.where}: {option} is for chats, and this record is plain text", param=option)
    if not text:
        raise DataError(f"{reader.where}: the text is empty, so there is nothing to learn", param=reader.param)
    return text

"""Training records as users write them: read, checked, and brought into the form that is trained on. Torch-free.

A data file is JSON, JSONL, CSV, Parquet or text (sources.py), its records have one of seven forms (formats.py). All but
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
    Content,
    RecordReader,
    check_has_columns,
    find_format,
    public_name,
    used_columns,
    with_prompts,
)
from trainer.data.options import ReadOptions
from trainer.data.sources import read_values

DEFAULT_OPTIONS = ReadOptions()
WRONG_RECIPE = {
    False: "a preference of two answers, from which only the recipe dpo learns; set recipe to dpo, or data_format to a "
    "format of one answer",
    True: 'the recipe dpo learns from preferences: "chosen" and "rejected", or "input", "preferred_output" and '
    '"non_preferred_output"',
}
"""What is said of a record that a recipe does not learn from, by whether preferences are expected."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record(Content):
    """One record of a data file, checked."""

    where: str
    """Where it stands, for error messages: `train.jsonl, record 3 (line 5)`."""
    unused_columns: tuple[str, ...] = ()
    """Columns of the file that training does not look at."""
    data_format: str = "messages"
    """Which form it was written in."""

    @property
    def num_chars(self) -> int:
        """Of its contents, about."""
        contents = (message.get("content") or "" for message in (*self.messages, *self.rejected))
        return len(self.text or "") + sum(map(len, contents))


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
    content = CONVERTERS[data_format](RecordReader(record, options, where, param))
    used = used_columns(data_format, options)
    return Record(
        messages=with_prompts(content.messages, options),
        rejected=with_prompts(content.rejected, options),
        tools=content.tools,
        text=content.text,
        prompt=content.prompt,
        where=where,
        unused_columns=(*(key for key in record if key not in used), *content.unused_fields),
        data_format=public_name(data_format),
    )

"""From a data file to the values in it, whatever it is written in. Torch-free."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.data.errors import DataError
from trainer.data.json_source import json_values
from trainer.data.options import TELLING_COLUMNS, ReadOptions, Source
from trainer.data.parquet_source import MAGIC, parquet_values
from trainer.data.text_sources import csv_values, text_values

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
ENDINGS: dict[str, Source] = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}

_readers = {"json": json_values, "csv": csv_values, "text": text_values, "parquet": parquet_values}


def read_values(path: Path, name: str, options: ReadOptions) -> Iterator[tuple[str, Any]]:
    """Each value with its place in the file: `line 5`, in Parquet `row 5`.

    Raises DataError that calls the file `name` and says where the mistake is.
    """
    try:
        source = find_source(path, name, options)
        unit = "row" if source == "parquet" else "line"
        with path.open("rb") as file:
            file.seek(len(BYTE_ORDER_MARK) if file.read(3) == BYTE_ORDER_MARK and source != "parquet" else 0)
            for place, value in _readers[source](file, name):
                yield f"{unit} {place}", value
    except OSError as error:
        raise DataError(f"cannot read the data file {name}: {error.strerror}") from error


def find_source(path: Path, name: str, options: ReadOptions) -> Source:
    """What the file is: as `options` say, else by its first bytes and the ending of `name`. Raises OSError."""
    if options.source != "auto":
        return options.source
    with path.open("rb") as file:
        start = file.read(64 << 10)
    if start.startswith(MAGIC):
        return "parquet"
    by_ending = ENDINGS.get(Path(name).suffix.lower()) or ENDINGS.get(path.suffix.lower())
    if by_ending == "text" and start.lstrip().startswith(b'{"'):
        return "json"  # JSONL under another name: its braces are not what shall be learned
    return by_ending or ("csv" if _has_known_header(start.removeprefix(BYTE_ORDER_MARK), options) else "json")


def is_unknown_table(path: Path, name: str, options: ReadOptions) -> bool:
    """Whether the file is a table with rows, and none of its columns is of a known format. Raises DataError."""
    _, first = next(read_values(path, name, options), ("", None))
    is_table = find_source(path, name, options) in ("csv", "parquet")
    return is_table and first is not None and not any(options.column(column) in first for column in TELLING_COLUMNS)


def _has_known_header(start: bytes, options: ReadOptions) -> bool:
    line = start.split(b"\n", 1)[0].decode("utf-8", "replace")
    try:
        header = next(csv.reader([line]), [])
    except csv.Error:
        return False
    return any(options.column(column) in header for column in TELLING_COLUMNS)

"""Parquet data files, read in batches of rows. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from trainer.data.errors import DataError, check_columns, check_size

MAGIC = b"PAR1"
BATCH_ROWS = 64
MAX_ROW_GROUP_BYTES = 4 << 30


def parquet_values(file: BinaryIO, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows as JSON values, each with its number from 1. Raises DataError with the file and the row.

    Parquet gives every struct of a column the same fields, null where a record has none: those are left out.
    """
    number = 0
    try:
        table = pq.ParquetFile(file)
        _check_shape(table, name)
        for batch in table.iter_batches(batch_size=BATCH_ROWS):
            for row in batch.to_pylist():
                number += 1
                check_size(num_bytes(row), f"{name}, record {number} (row {number})")
                yield number, {column: without_nulls(value) for column, value in row.items()}
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).split("\n", 1)[0]
        raise DataError(f"{name}, row {number + 1}: cannot be read as Parquet: {reason:.300}") from error


def _check_shape(table: pq.ParquetFile, name: str) -> None:
    check_columns(table.schema_arrow.names, name, "")
    metadata = table.metadata
    largest = max((metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups)), default=0)
    if largest > MAX_ROW_GROUP_BYTES:
        limit = f"{MAX_ROW_GROUP_BYTES >> 30} GiB"
        raise DataError(f"{name}: a row group of {largest} bytes, more than {limit}; write it with smaller row groups")


def num_bytes(value: object) -> int:
    if isinstance(value, dict):
        return sum(map(num_bytes, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(num_bytes, value))
    return len(value) if isinstance(value, str | bytes) else 8


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value

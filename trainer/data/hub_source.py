"""Data sets of the Hugging Face hub, through the `datasets` library: its cache, its network, its Arrow files. Torch-free.

Rows stay in Arrow files on disk. Arrow gives every struct of a column the same fields, null where a record has none:
those are left out, as in Parquet files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.data.errors import DataError, check_columns, check_size
from trainer.data.parquet_source import num_bytes, without_nulls

MEDIA = ("Image", "Audio", "Video", "Pdf")
"""Columns that are not looked at, and not decoded."""


class HubDataset:
    """One split of a data set. Raises DataError where it cannot be had."""

    def __init__(self, hub_id: str, config: str | None, split: str, param: str = "hub_id") -> None:
        import datasets  # a second to import, and only for these data sets

        self.name = f"{hub_id}, {split}"
        if Path(hub_id).exists():  # the library would read it
            raise DataError(f"hub_id: {hub_id!r} is a file or folder here; name it in data_files", param=param)
        quiet = datasets.utils.logging.get_verbosity()
        datasets.utils.logging.set_verbosity_error()
        try:
            self._rows = datasets.load_dataset(hub_id, config, split=split)
        except Exception as error:  # the library raises what it meets, of network, files, and its own
            reason = " ".join(str(error).split())
            raise DataError(
                f"hub_id: cannot load {hub_id!r} ({type(error).__name__}: {reason:.300}); check the id, hub_config and "
                "split, and that there is a network, or download it into the cache first",
                param=param,
            ) from error
        finally:
            datasets.utils.logging.set_verbosity(quiet)
        check_columns(self._rows.column_names, self.name, "")
        media = tuple(getattr(datasets, name) for name in MEDIA if hasattr(datasets, name))
        plain = [name for name, feature in self._rows.features.items() if not isinstance(feature, media)]
        self._plain = self._rows.select_columns(plain)

    @property
    def num_records(self) -> int:
        return int(self._rows.num_rows)

    def values(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The rows as JSON values, each with its place."""
        for number, row in enumerate(self._plain, start=1):
            check_size(num_bytes(row), f"{self.name}, record {number} (row {number})")
            yield f"row {number}", {column: without_nulls(value) for column, value in row.items()}

    def digest(self) -> str:
        """Of the content: the same wherever it was loaded."""
        digest = hashlib.sha256()
        for entry in self._rows.cache_files:
            with Path(entry["filename"]).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

"""What a user may say about how data files are read. Torch-free, and imports nothing of the data package."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

DataFormat = Literal["auto", "instruct", "alpaca", "sharegpt", "messages", "completion", "preference", "text"]
Role = Literal["system", "user", "assistant"]
Source = Literal["auto", "json", "csv", "text", "parquet"]

FORMAT_COLUMNS: dict[str, tuple[str, ...]] = {
    "instruct": ("input", "output"),
    "alpaca": ("instruction", "output", "input"),
    "sharegpt": ("conversations", "system", "tools"),
    "messages": ("messages", "tools"),
    "completion": ("prompt", "completion"),
    "preference": ("chosen", "rejected", "prompt", "conversations", "system", "tools"),
    "openai_preference": ("input", "preferred_output", "non_preferred_output"),
    "text": ("text",),
}
"""The columns that each format reads, by their standard names. `preference` has two layouts, the second one OpenAI's."""

OPTIONAL_COLUMNS = {
    "alpaca": ("input",),
    "sharegpt": ("system", "tools"),
    "messages": ("tools",),
    "preference": ("prompt", "conversations", "system", "tools"),
}
"""Those that may be missing or null."""

COLUMN_NAMES = tuple(dict.fromkeys(column for columns in FORMAT_COLUMNS.values() for column in columns))

TELLING_COLUMNS = tuple(name for name in COLUMN_NAMES if name not in ("prompt", "system", "tools"))
"""Those by which a table is known to hold records. The others are names that anything may have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadOptions:
    """How to read data files; the fields are those of `TrainingOptions`, where they are documented."""

    source: Source = "auto"
    data_format: DataFormat = "auto"
    column_map: Mapping[str, str] | None = None
    new_system_prompt: str | None = None
    prompt_template: Mapping[Role, tuple[str, str]] | None = None

    def column(self, name: str) -> str:
        """What the user's file calls the column `name`."""
        return (self.column_map or {}).get(name, name)

"""A run's tokens on disk: written once, read row by row, so that memory does not grow with the data. Torch-free.

ids.bin, spans.bin   int32, the examples one after the other (`trainer.data.encoding.Piece`)
index.bin            int64, three for each example: where its ids end, where its spans end, how many tokens are trained
store.json           written last: what the examples are
"""

from __future__ import annotations

import json
import os
import shutil
import weakref
from array import array
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from trainer.data.encoding import Piece
from trainer.data.examples import Example

META = "store.json"
INDEX_NUMBERS = 3
INT32, INT64 = 4, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreInfo:
    """What is known of the records that were stored."""

    fingerprint: str
    """Of everything that decides the tokens: the data's bytes and how they are read, tokenizer, template, options."""
    set_sizes: tuple[int, ...]
    """Examples of each data set, one after the other; of pairs two for each."""
    records: int
    skipped: int
    """Records without a trained token, which are not stored."""
    truncated: int
    longest: int
    formats: dict[str, int]
    warnings: tuple[str, ...]


class StoreWriter:
    """Appends examples to files in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = [(folder / name).open("wb", buffering=1 << 20) for name in ("ids.bin", "spans.bin", "index.bin")]
        self._ends = [0, 0]
        self.num_examples = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files:
            file.close()

    def add(self, piece: Piece) -> None:
        ids, spans, index = self._files
        ids.write(piece.ids)
        spans.write(piece.spans)
        self._ends[0] += len(piece.ids) // INT32
        self._ends[1] += len(piece.spans) // INT32
        index.write(array("q", (*self._ends, piece.num_trained)).tobytes())
        self.num_examples += 1

    def finish(self, info: StoreInfo) -> None:
        for file in self._files:
            file.flush()
        (self._folder / META).write_text(json.dumps(asdict(info), ensure_ascii=False), encoding="utf-8")


class TokenStore:
    """The examples of a finished store by their number. Files are read, not mapped: what was read takes no memory."""

    def __init__(self, folder: Path, info: StoreInfo) -> None:
        self.info = info
        self._ids, self._spans, self._index = (
            _opened(self, folder / f"{name}.bin") for name in ("ids", "spans", "index")
        )
        self.num_examples = sum(info.set_sizes)

    def __getitem__(self, number: int) -> Example:
        ids_start, spans_start, ids_end, spans_end = self._bounds(number)
        ids, spans = array("i"), array("i")
        ids.frombytes(os.pread(self._ids, (ids_end - ids_start) * INT32, ids_start * INT32))
        spans.frombytes(os.pread(self._spans, (spans_end - spans_start) * INT32, spans_start * INT32))
        trained = array("i")
        for start, stop in zip(spans[::2], spans[1::2], strict=True):
            trained.extend(range(start, stop))
        return Example(ids, trained)

    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each example."""
        return np.diff(self._read_index()[:, 0], prepend=0)

    def trained_counts(self) -> NDArray[np.int64]:
        """Trained tokens of each example."""
        return self._read_index()[:, 2]

    def _bounds(self, number: int) -> tuple[int, int, int, int]:
        """Where ids and spans start, and where they end."""
        size = INDEX_NUMBERS * INT64
        numbers = array("q")
        numbers.frombytes(os.pread(self._index, size, number * size))
        before = array("q", [0, 0])
        if number > 0:
            before = array("q")
            before.frombytes(os.pread(self._index, size, (number - 1) * size))
        return before[0], before[1], numbers[0], numbers[1]

    def _read_index(self) -> NDArray[np.int64]:
        size = self.num_examples * INDEX_NUMBERS * INT64
        return np.frombuffer(os.pread(self._index, size, 0), np.int64).reshape(-1, INDEX_NUMBERS)


def open_store(folder: Path, fingerprint: str) -> TokenStore | None:
    """The store in `folder`, if it is whole and has this fingerprint."""
    try:
        data = json.loads((folder / META).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    info = StoreInfo(**{**data, "set_sizes": tuple(data["set_sizes"]), "warnings": tuple(data["warnings"])})
    return TokenStore(folder, info) if info.fingerprint == fingerprint else None


def clear_store(folder: Path) -> None:
    """Remove a store, and what a killed trainer left of one."""
    for path in (folder, *folder.parent.glob(f".{folder.name}.*.tmp")):
        shutil.rmtree(path, ignore_errors=True)


def _opened(store: TokenStore, path: Path) -> int:
    descriptor = os.open(path, os.O_RDONLY)
    weakref.finalize(store, os.close, descriptor)
    return descriptor

"""A run's data sets: read, tokenized and stored, or found as they were stored before. Torch-free."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

from lm.folder import publish
from lm.tokenizer import FILES
from trainer.data.encoding import Encoded, Encoder
from trainer.data.errors import DataError
from trainer.data.hub_source import HubDataset
from trainer.data.options import ReadOptions
from trainer.data.records import Record, read_records, to_record
from trainer.data.sources import find_source
from trainer.data.split import Split, take
from trainer.data.store import StoreInfo, StoreWriter, TokenStore, clear_store, open_store
from trainer.data.workers import EncoderSpec, encode_apart

STORE_VERSION = 1
TOKENIZER_FILES = (
    *FILES,
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "config.json"),
    "additional_chat_templates/tool_use.jinja",
)
"""What of a model folder decides the tokens."""
SMALL_BYTES = 2 << 20
"""Data of up to this size is tokenized sooner than other processes have started."""


@dataclass(frozen=True, kw_only=True)
class RecordSet:
    """One of a run's data sets, and how it is read."""

    files: tuple[str, ...] = ()
    hub_id: str | None = None
    hub_config: str | None = None
    split: Split
    options: ReadOptions
    limit: int | None = None
    """Only so many of its records, the first ones."""

    @cached_property
    def hub(self) -> HubDataset:
        """Loaded once."""
        assert self.hub_id is not None
        return HubDataset(self.hub_id, self.hub_config, self.split.name)

    def records(self) -> Iterator[Record]:
        """Raises DataError, also where the split holds nothing."""
        yield from itertools.islice(take(self.split, self._all_records), self.limit)

    def _all_records(self) -> Iterator[Record]:
        if self.hub_id is not None:
            for number, (place, value) in enumerate(self.hub.values(), start=1):
                yield to_record(value, f"{self.hub.name}, record {number} ({place})", options=self.options)
        for name in self.files:
            yield from read_records(Path(name), options=self.options)

    def sources(self) -> list[str]:
        """What kind each file is, for people."""
        if self.hub_id is not None:
            return ["the hub"]
        return [find_source(Path(name), name, self.options) for name in self.files]

    def num_bytes(self) -> int:
        """Of its files; of a hub's data set that of a large one."""
        return SMALL_BYTES + 1 if self.hub_id is not None else sum(Path(name).stat().st_size for name in self.files)

    def identity(self) -> list[object]:
        """Of the content, wherever it stands, and how it is read."""
        digests = [self.hub.digest()] if self.hub_id is not None else [_digest(Path(name)) for name in self.files]
        return [
            digests,
            self.split.name,
            *self.split.bounds(None),
            self.split.in_percent,
            asdict(self.options),
            self.limit,
        ]


def store_records(
    sets: Sequence[RecordSet],
    spec: EncoderSpec,
    folder: Path,
    *,
    num_workers: int,
    check_cancelled: Callable[[], None],
    encoder: Encoder | None = None,
) -> TokenStore:
    """The tokens of all records, from `folder` where they were stored before.

    Raises DataError that names the record, or says that a set has nothing to train on, and what `check_cancelled`
    raises. `encoder` is `spec`'s, where there is one already.
    """
    identity = fingerprint(sets, spec)
    if (stored := open_store(folder, identity)) is not None:
        return stored
    clear_store(folder)
    is_small = sum(one.num_bytes() for one in sets) <= SMALL_BYTES
    with publish(folder) as temporary, StoreWriter(temporary) as writer:
        counts = _Counts(identity)
        for one in sets:
            records = _checking(one.records(), check_cancelled)
            if is_small or num_workers == 1:
                encode = encoder = encoder or spec.build()
                encoded: Iterable[tuple[Record, Encoded]] = ((record, encode(record)) for record in records)
            else:
                encoded = encode_apart(records, spec, num_workers)
            _store_set(encoded, writer, counts, spec)
        writer.finish(counts.info(spec))
    stored = open_store(folder, identity)
    assert stored is not None
    return stored


def fingerprint(sets: Sequence[RecordSet], spec: EncoderSpec) -> str:
    """Of everything that decides the tokens. Raises DataError for a file that cannot be read."""
    model = Path(spec.model)
    files = {name: _digest(model / name) for name in TOKENIZER_FILES if (model / name).is_file()}
    if spec.tokenizer_file is not None:
        files["tokenizer_file"] = _digest(Path(spec.tokenizer_file))
    how = asdict(replace(spec, model="", tokenizer_file=None))
    text = json.dumps([STORE_VERSION, files, how, [one.identity() for one in sets]], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class _Counts:
    """What is counted while records are stored."""

    def __init__(self, identity: str) -> None:
        self.identity = identity
        self.set_sizes: list[int] = []
        self.records = self.skipped = self.truncated = self.longest = 0
        self.first_skipped = ""
        self.formats: Counter[str] = Counter()
        self.unused_columns: dict[str, None] = {}

    def add(self, record: Record, encoded: Encoded, max_seq_len: int) -> None:
        self.records += 1
        self.formats[record.data_format] += 1
        self.truncated += encoded.length > max_seq_len
        self.longest = max(self.longest, encoded.length)
        if len(self.unused_columns) < 20:
            self.unused_columns.update(dict.fromkeys(record.unused_columns))
        if not encoded.pieces:
            self.first_skipped = self.first_skipped or record.where
            self.skipped += 1

    def info(self, spec: EncoderSpec) -> StoreInfo:
        warnings = []
        if self.skipped:
            warnings.append(
                f"left out {self.skipped} of {self.records} records: within max_seq_len={spec.max_seq_len} tokens there "
                f"is nothing but the prompt, or answers of weight 0; the first is {self.first_skipped}"
            )
        if self.unused_columns:
            warnings.append(f"columns that are not used: {', '.join(list(self.unused_columns)[:20])}")
        return StoreInfo(
            fingerprint=self.identity,
            set_sizes=tuple(self.set_sizes),
            records=self.records,
            skipped=self.skipped,
            truncated=self.truncated,
            longest=self.longest,
            formats=dict(self.formats),
            warnings=tuple(warnings),
        )


def _store_set(
    encoded: Iterable[tuple[Record, Encoded]], writer: StoreWriter, counts: _Counts, spec: EncoderSpec
) -> None:
    before, num_records = writer.num_examples, counts.records
    for record, one in encoded:
        counts.add(record, one, spec.max_seq_len)
        for piece in one.pieces:
            writer.add(piece)
    counts.set_sizes.append(writer.num_examples - before)
    if writer.num_examples == before:
        raise DataError(
            f"no record has a token to train on: within max_seq_len={spec.max_seq_len} tokens all "
            f"{counts.records - num_records} hold nothing but their prompt, or answers of weight 0; raise max_seq_len "
            "or shorten the prompts",
            param="max_seq_len",
        )


def _checking(records: Iterator[Record], check_cancelled: Callable[[], None]) -> Iterator[Record]:
    for record in records:
        check_cancelled()
        yield record


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"cannot read the data file {path.name}: {error.strerror}") from error

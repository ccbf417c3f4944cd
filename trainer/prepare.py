"""The data of a run as the recipe goes over it: read, sliced, tokenized, packed, and told about. Torch-free."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lm.template import ChatTemplate, load_template
from lm.tokenizer import load_tokenizer
from trainer.config import RunConfig
from trainer.data.dataset import Dataset, load_dataset
from trainer.data.examples import Row
from trainer.data.packing import pack
from trainer.data.records import Record, read_records
from trainer.data.sources import find_source
from trainer.data.split import parse_split, take
from trainer.progress import Progress
from trainer.run_folder import RunFolder

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunData:
    training: Sequence[Row]
    """What an epoch goes over: examples, packed rows of several, or for dpo pairs."""
    validation: Sequence[Row]


def prepare_data(
    config: RunConfig, *, max_seq_len: int, folder: RunFolder, progress: Progress, check_cancelled: Callable[[], None]
) -> RunData:
    """Raises UserError for a mistake in the data, which names the record, and what `check_cancelled` raises."""

    def records() -> Iterator[Record]:
        for name in data_files(config):
            for record in read_records(Path(name), options=config.reading):
                check_cancelled()
                yield record

    template = _load_template(config)
    dataset = load_dataset(
        take(parse_split(config.split), records),
        template,
        max_seq_len=max_seq_len,
        train_on_input=config.train_on_input,
        validation_split=config.validation_split,
        seed=config.seed,
    )
    rows = pack(dataset.training, max_seq_len) if config.packed else dataset.training
    _report(config, dataset, len(rows), max_seq_len, progress)
    return RunData(rows, dataset.validation)


def data_files(config: RunConfig) -> list[str]:
    return [name for dataset in config.training_sets for name in dataset.data_files or ()]


def _load_template(config: RunConfig) -> ChatTemplate:
    base = Path(config.model)
    file = None if config.tokenizer_file is None else Path(config.tokenizer_file)
    tokenizer = load_tokenizer(base, file)
    log.info("Tokenizer is initialized from file.")
    log.info(f"Tokenizer file: {tokenizer.origin}")
    return load_template(base, tokenizer)


def _report(config: RunConfig, dataset: Dataset, num_rows: int, max_seq_len: int, progress: Progress) -> None:
    report = dataset.report()
    sources = Counter(find_source(Path(name), name, config.reading) for name in data_files(config))
    log.info(f"Data files: {', '.join(f'{count} of {source}' for source, count in sources.items())}.")
    how = "by their columns" if config.data_format == "auto" else "as data_format says"
    log.info(f"Data: {', '.join(f'{count} records of {name}' for name, count in dataset.formats.items())}, {how}.")
    if config.packed:
        share = report["tokens"] / (num_rows * max_seq_len)
        log.info(f"Packed {report['records']} records into {num_rows} rows, {share:.1%} of them filled.")
        report["rows"] = num_rows
    progress.event("dataset", **report)
    for warning in dataset.warnings:
        log.warning(warning)
        progress.event("warning", message=warning)

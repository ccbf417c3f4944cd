"""The data of a run as the recipe goes over it: read, sliced, tokenized, packed, and told about. Torch-free."""

from __future__ import annotations

import logging
import random
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lm.errors import UserError
from lm.tokenizer import Tokenizer
from trainer.config import RunConfig
from trainer.data.dataset import RecordSet, store_records
from trainer.data.errors import DataError
from trainer.data.examples import Example, Pair, Row
from trainer.data.rows import ExampleRows, MixedRows, PackedRows, PairRows
from trainer.data.split import parse_split
from trainer.data.store import TokenStore
from trainer.data.workers import EncoderSpec, available_cores
from trainer.option_groups import DatasetConfig
from trainer.progress import Progress
from trainer.run_folder import RunFolder

log = logging.getLogger(__name__)

NUM_SHOWN = 3
SHOWN_TOKENS = 1000
"""Of an example that is shown, so many tokens."""

Numbers = NDArray[np.int64]
"""Which examples of the store, or which pairs of examples."""


@dataclass(frozen=True, slots=True)
class RunData:
    training: Sequence[Row]
    """What an epoch goes over: examples, packed rows of several, or for dpo pairs. Read from disk row by row."""
    validation: Sequence[Row]
    fingerprint: str
    """Of the data and of how they became tokens: equal ones give equal tokens, wherever the files stand."""
    report: Mapping[str, Any]
    """The values of the `dataset` event."""


def prepare_data(
    config: RunConfig,
    *,
    max_seq_len: int,
    folder: RunFolder,
    progress: Progress,
    check_cancelled: Callable[[], None],
    sample: int | None = None,
) -> RunData:
    """Tokens are kept in the folder's `state/data` and found there again. With `sample` only so many records of each
    data set are taken, to tell about them before a run.

    Raises UserError for a mistake in the data, which names the record, and what `check_cancelled` raises.
    """
    if config.early_stopping_patience is not None and config.validation is None and not config.validation_split:
        name = "early_stopping_patience"
        raise UserError(f"{name}: nothing is held out; give validation, or validation_split above 0", param=name)
    spec = EncoderSpec(
        model=config.model,
        tokenizer_file=config.tokenizer_file,
        max_seq_len=max_seq_len,
        masking=config.trained_on,
        truncation=config.truncation,
        pairs=config.recipe == "dpo",
    )
    tokenizer = (encoder := spec.build()).template.tokenizer
    log.info("Tokenizer is initialized from file.")
    log.info(f"Tokenizer file: {tokenizer.origin}")
    sets = [_record_set(one, config, sample) for one in _data_sets(config)]
    store = store_records(
        sets,
        spec,
        folder.path / "state" / "data",
        num_workers=config.num_threads or available_cores(),
        check_cancelled=check_cancelled,
        encoder=encoder,
    )
    training, validation = _divide(store, config)
    rows = _rows(store, training, config, max_seq_len)
    report = _report(store, training, validation, rows if config.packed else None)
    _tell(config, sets, store, training, report, max_seq_len)
    progress.event("dataset", **report)
    progress.event("examples", examples=list(_shown(store, training, config.recipe == "dpo", tokenizer)))
    for warning in store.info.warnings:
        log.warning(warning)
        progress.event("warning", message=warning)
    return RunData(rows, _plain_rows(store, validation, config), store.info.fingerprint, report)


def _data_sets(config: RunConfig) -> Iterator[DatasetConfig]:
    yield from config.training_sets
    if config.validation is not None:
        yield config.validation


def _record_set(dataset: DatasetConfig, config: RunConfig, sample: int | None) -> RecordSet:
    split = config.split if dataset.split is None else dataset.split
    return RecordSet(
        files=dataset.data_files or (),
        hub_id=dataset.hub_id,
        hub_config=dataset.hub_config,
        split=parse_split(split, any_name=dataset.hub_id is not None),
        options=dataset.reading(config.reading),
        limit=sample,
    )


# ---- which rows


def _divide(store: TokenStore, config: RunConfig) -> tuple[list[Numbers], Numbers]:
    """The examples (or pairs) of each training set, and those that are held out."""
    sizes = [size // 2 if config.recipe == "dpo" else size for size in store.info.set_sizes]
    starts = [0, *accumulate(sizes)]
    num_training = starts[len(config.training_sets)]
    held_out = np.arange(num_training, starts[-1])
    is_held_out = np.zeros(num_training, bool)
    if config.validation_split:
        held_out = _drawn(num_training, config.validation_split, config.seed)
        is_held_out[held_out] = True
    sets = [
        start + np.flatnonzero(~is_held_out[start:stop])
        for start, stop in pairwise(starts[: len(config.training_sets) + 1])
    ]
    return sets, held_out


def _drawn(num_rows: int, share: float, seed: int) -> Numbers:
    """`share` of the rows, at least one, drawn by `seed`."""
    count = max(1, round(share * num_rows))
    if count == num_rows:
        raise DataError(
            f"validation_split={share} leaves nothing to train on: there is only {count} record",
            param="validation_split",
        )
    return np.sort(np.array(random.Random(seed).sample(range(num_rows), count), np.int64))


def _rows(store: TokenStore, training: list[Numbers], config: RunConfig, max_seq_len: int) -> Sequence[Row]:
    sets: list[tuple[Sequence[Row], float]] = [
        (
            PackedRows(store, numbers, max_seq_len) if config.packed else _plain_rows(store, numbers, config),
            dataset.weight,
        )
        for numbers, dataset in zip(training, config.training_sets, strict=True)
        if len(numbers)
    ]
    return sets[0][0] if [weight for _, weight in sets] == [1] else MixedRows(sets)


def _plain_rows(store: TokenStore, numbers: Numbers, config: RunConfig) -> Sequence[Row]:
    return PairRows(store, numbers) if config.recipe == "dpo" else ExampleRows(store, numbers)


# ---- what is told


def _report(
    store: TokenStore, training: list[Numbers], validation: Numbers, packed: Sequence[Row] | None
) -> dict[str, Any]:
    numbers = np.concatenate(training)
    per_record = store.num_examples // max(1, sum(map(len, training)) + len(validation))  # 2 for pairs
    lengths, trained = (
        counts.reshape(-1, per_record).sum(1)[numbers].sum() for counts in (store.lengths(), store.trained_counts())
    )
    info = store.info
    return {
        "records": len(numbers),
        "tokens": int(lengths),
        "trained_tokens": int(trained),
        "truncated": info.truncated,
        "longest": info.longest,
        "validation_records": len(validation),
        "skipped": info.skipped,
        "formats": dict(info.formats),
        "fingerprint": info.fingerprint,
        **({} if packed is None else {"rows": len(packed)}),
    }


def _tell(
    config: RunConfig,
    sets: Sequence[RecordSet],
    store: TokenStore,
    training: list[Numbers],
    report: Mapping[str, Any],
    max_seq_len: int,
) -> None:
    sources = Counter(source for one in sets for source in one.sources())
    log.info(f"Data files: {', '.join(f'{count} of {source}' for source, count in sources.items())}.")
    how = "by their columns" if config.data_format == "auto" else "as data_format says"
    formats = ", ".join(f"{count} records of {name}" for name, count in store.info.formats.items())
    log.info(f"Data: {formats}, {how}.")
    if config.packed:
        lengths = store.lengths()
        weighted = zip(config.training_sets, training, strict=True)
        share = sum(one.weight * lengths[numbers].sum() for one, numbers in weighted) / (report["rows"] * max_seq_len)
        log.info(f"Packed {report['records']} records into {report['rows']} rows, {share:.1%} of them filled.")


def _shown(store: TokenStore, training: list[Numbers], pairs: bool, tokenizer: Tokenizer) -> Iterator[dict[str, Any]]:
    """The first records as the model sees them, with what of them is trained."""
    for number in np.concatenate(training)[:NUM_SHOWN].tolist():
        if pairs:
            pair = Pair(store[2 * number], store[2 * number + 1])
            yield {"answer": "chosen", "segments": _segments(pair.chosen, tokenizer)}
            yield {"answer": "rejected", "segments": _segments(pair.rejected, tokenizer)}
        else:
            yield {"segments": _segments(store[number], tokenizer)}


def _segments(example: Example, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    ids = example.ids[:SHOWN_TOKENS]
    trained = set(example.trained)
    positions: list[tuple[bool, array[int]]] = [
        (is_trained, array("i", group)) for is_trained, group in groupby(range(len(ids)), trained.__contains__)
    ]
    return [
        {"text": tokenizer.decode([ids[place] for place in group], skip_special_tokens=False), "trained": is_trained}
        for is_trained, group in positions
    ]

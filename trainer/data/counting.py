"""How many records a data set has, without reading each of them where that can be had for less. Torch-free."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq

from trainer.config import TrainingOptions
from trainer.data.hub_source import HubDataset
from trainer.data.options import ReadOptions
from trainer.data.sources import find_source, read_values
from trainer.data.split import parse_split
from trainer.option_groups import DatasetConfig

CHUNK = 4 << 20


def count_records(options: TrainingOptions, dataset: DatasetConfig) -> int:
    """Records of the split that `dataset` names. In files of lines each line counts, also one that is blank."""
    split = parse_split(dataset.split or options.split, any_name=dataset.hub_id is not None)
    if dataset.hub_id is not None:
        total = HubDataset(dataset.hub_id, dataset.hub_config, split.name).num_records
    else:
        reading = dataset.reading(options.reading)
        total = sum(_in_file(Path(name), reading) for name in dataset.data_files or ())
    start, stop = split.bounds(total)
    return max(0, min(total, total if stop is None else stop) - start)


def _in_file(path: Path, reading: ReadOptions) -> int:
    match find_source(path, path.name, reading):
        case "parquet":
            return int(pq.read_metadata(path).num_rows)
        case "json" if _is_list(path):
            return sum(1 for _ in read_values(path, path.name, reading))
        case "csv":
            return max(0, _lines(path) - 1)
        case _:
            return _lines(path)


def _is_list(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(CHUNK).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def _lines(path: Path) -> int:
    count, last = 0, b"\n"
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            count += chunk.count(b"\n")
            last = chunk
    return count + (not last.endswith(b"\n"))

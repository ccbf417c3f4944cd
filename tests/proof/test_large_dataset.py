"""The memory of a process that prepares data and takes batches of it does not grow with the data."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from benchmarks.large_dataset import write_records
from tests.support.tiny import make_tiny_llama

pytestmark = pytest.mark.slow

PROGRAM = """
import itertools, json, resource, sys
from pathlib import Path
from trainer.config import load_run_config
from trainer.data.batches import epoch_steps
from trainer.prepare import prepare_data
from trainer.progress import Progress
from trainer.run_folder import RunFolder

run = RunFolder(Path(sys.argv[1]))
config = load_run_config(run.config)
with Progress(run) as progress:
    data = prepare_data(config, max_seq_len=512, folder=run, progress=progress, check_cancelled=lambda: None)
steps = epoch_steps(data.training, batch_size=4, accumulation=2, seed=0, epoch=1, first_step=100)
taken = sum(1 for _ in itertools.islice(steps, 200))
print(json.dumps([len(data.training), taken, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10]))
"""


def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    model = make_tiny_llama(tmp_path / "model", max_position_embeddings=1024)
    (few, _, small), (many, _, large) = (figures(tmp_path, model, count) for count in (5_000, 20_000))
    assert many > 3 * few
    assert large - small < 8 << 20  # 4 bytes for each of 4 million tokens more would be 16


def figures(folder: Path, model: Path, count: int) -> tuple[int, int, int]:
    """Rows, steps that were taken, and peak resident bytes."""
    run = folder / str(count)
    data = write_records(run / "train.jsonl", count)
    options = {"model": str(model), "data_files": [str(data)], "packed": True, "validation_split": 0.05}
    (run / "config.yaml").write_text(yaml.safe_dump(options), encoding="utf-8")
    command = [sys.executable, "-c", PROGRAM, str(run)]
    root = Path(__file__).parents[2]
    output = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    rows, steps, peak = json.loads(output)
    return rows, steps, peak

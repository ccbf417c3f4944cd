"""Whether the disk holds what a run will write, as far as that can be said before it starts. Torch-free."""

from __future__ import annotations

import shutil
from pathlib import Path

from lm.config import load_config
from lm.errors import UserError
from trainer.config import TrainingOptions
from trainer.estimate import Precision, estimate_disk

SPARE_BYTES = 128 << 20
"""For logs, events, tokenizers and the tokenized data of a small set."""


class NoDiskSpaceError(UserError):
    """The run will not fit; the message has the figures."""


def check_disk_space(
    folder: Path, options: TrainingOptions, *, base: Path, data_bytes: int, merge_start: bool = False
) -> None:
    """Raises NoDiskSpaceError unless the disk of `folder`, which exists, holds what a run of the model in `base` writes
    at least: one checkpoint and its training state, and tokens, which take about as much as the data's text.

    What an earlier trainer has written into `folder` counts. The trainer itself looks at all checkpoints.
    """
    config = load_config(base)
    precision: Precision = "fp32" if options.dtype == "fp32" else "bf16"
    disk = estimate_disk(config, options, precision=precision, num_checkpoints=1)
    merged_base = config.num_parameters * 2 if merge_start else 0
    needed = disk.total + merged_base + data_bytes - _written(folder) + SPARE_BYTES
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise NoDiskSpaceError(
            f"the run will write at least {needed / 1e9:.2f} GB, and there are {free / 1e9:.2f} GB free where the runs "
            "lie; free some space, for one by DELETE /finetune/{id} of old jobs, and resume this one"
        )


def _written(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

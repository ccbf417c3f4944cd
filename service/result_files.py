"""The figures of a job that succeeded as a file of /v1/files, in the columns of OpenAI's result files."""

from __future__ import annotations

import asyncio
import csv
import io
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from service.figures import newest_figures
from service.files import RESULTS, FileStore
from service.jobs.job import Job
from service.jobs.store import JobStore
from trainer.run_folder import RunFolder

logger = logging.getLogger(__name__)

FILENAME = "step_metrics.csv"
COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")


class ResultFiles:
    def __init__(self, store: JobStore, files: FileStore, runs_dir: Path) -> None:
        self._store = store
        self._files = files
        self._runs_dir = runs_dir

    async def write(self, job: Job) -> tuple[str, ...]:
        """Keep the file, and its id; a second time it is the same file. None where it cannot be read or written: the
        model is there all the same. Steps are read aside: there may be many."""
        try:
            return (await self._write(job),)
        except OSError as error:
            logger.error("job %s has no file of results: %s", job.id, error.strerror)
            return ()

    async def _write(self, job: Job) -> str:
        events = self._store.events(job.id, types=("validation", "resumed"))
        metrics = RunFolder(self._runs_dir / job.run_name).metrics
        data = await asyncio.to_thread(results_csv, metrics, newest_figures(events)["validation"])
        return (await self._files.keep(data, file_id=_file_id(job), filename=FILENAME, purpose=RESULTS)).id


def _file_id(job: Job) -> str:
    return "file-" + job.id.removeprefix("ftjob-")


def results_csv(metrics: Path, validation: Iterable[dict[str, Any]]) -> bytes:
    """A line for each step in a run's metrics.csv; what was not measured after it is empty."""
    held_out = {event["step"]: event for event in validation}
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    with metrics.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            measured = held_out.get(int(row["step"]), {})
            trained = (row["step"], row["loss"], row.get("token_accuracy"))
            table.writerow([*trained, measured.get("loss"), measured.get("token_accuracy")])
    return text.getvalue().encode()

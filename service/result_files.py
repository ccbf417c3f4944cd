"""The figures of a job that succeeded as a file of /v1/files, in the columns of OpenAI's result files."""

from __future__ import annotations

import csv
import io
from typing import Any

from service.figures import newest_figures
from service.files import RESULTS, FileStore
from service.jobs.job import Job
from service.jobs.store import JobStore

FILENAME = "step_metrics.csv"
COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")


class ResultFiles:
    def __init__(self, store: JobStore, files: FileStore) -> None:
        self._store = store
        self._files = files

    def write(self, job: Job) -> tuple[str, ...]:
        """Keep the file, and its id. A second time, after the service died in between, it is the same file."""
        figures = newest_figures(self._store.events(job.id, types=("step", "validation", "resumed")))
        data = results_csv(figures["step"], figures["validation"]).encode()
        return (self._files.keep(data, file_id=_file_id(job), filename=FILENAME, purpose=RESULTS).id,)


def _file_id(job: Job) -> str:
    return "file-" + job.id.removeprefix("ftjob-")


def results_csv(steps: list[dict[str, Any]], validation: list[dict[str, Any]]) -> str:
    """A line a step; what was not measured after it is empty."""
    held_out = {event["step"]: event for event in validation}
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    for event in steps:
        measured = held_out.get(event["step"], {})
        accuracy = event.get("token_accuracy")
        table.writerow([event["step"], event["loss"], accuracy, measured.get("loss"), measured.get("token_accuracy")])
    return text.getvalue()

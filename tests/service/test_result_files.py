from __future__ import annotations

from pathlib import Path
from typing import Any

from service.database import Database
from service.files import FileStore
from service.jobs.store import JobStore
from service.result_files import ResultFiles
from trainer.config import TrainingOptions


def step(number: int, loss: float, accuracy: float | None = None) -> dict[str, Any]:
    return {"type": "step", "step": number, "loss": loss, "token_accuracy": accuracy}


def test_the_figures_of_a_job_are_one_file_with_openais_header(store: JobStore, database: Database, home: Path) -> None:
    files = FileStore(database, home / "files")
    job = store.create(
        status="queued", model="tiny", options=TrainingOptions(), data_files=["a"], suffix="", promote="final"
    )
    measured = {"type": "validation", "step": 2, "loss": 1.25, "token_accuracy": 0.5}
    events = [step(1, 1.52347, 0.0), step(2, 9.0), {"type": "resumed", "step": 1}, step(2, 1.5, 0.25), measured]
    store.record(job.id, events)
    results = ResultFiles(store, files)
    (file_id,) = results.write(job)
    assert results.write(job) == (file_id,)
    assert files.path(file_id).read_text() == (
        "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy\n1,1.52347,0.0,,\n2,1.5,0.25,1.25,0.5\n"
    )
    assert [(stored.id, stored.purpose, stored.filename) for stored in files.page(limit=9)[0]] == [
        (file_id, "fine-tune-results", "step_metrics.csv")
    ]

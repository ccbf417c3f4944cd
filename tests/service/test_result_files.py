from __future__ import annotations

import asyncio
from pathlib import Path

from service.database import Database
from service.files import FileStore
from service.jobs.store import JobStore
from service.result_files import ResultFiles
from trainer.config import TrainingOptions


def test_the_figures_of_a_job_are_one_file_with_openais_header(store: JobStore, database: Database, home: Path) -> None:
    files = FileStore(database, home / "files")
    job = store.create(
        status="queued", model="tiny", options=TrainingOptions(), data_files=["a"], suffix="", promote="final"
    )
    metrics = home / "runs" / job.run_name / "metrics.csv"
    metrics.parent.mkdir(parents=True)
    metrics.write_text("step,epoch,loss,token_accuracy\n1,1,1.52347,0.0\n2,1,1.5,0.25\n3,1,0.5,\n")
    measured = {"type": "validation", "step": 2, "loss": 1.25, "token_accuracy": 0.5}
    superseded = measured | {"step": 3, "loss": 9.0}
    store.record(job.id, [measured, superseded, {"type": "resumed", "step": 2}])
    assert asyncio.run(ResultFiles(store, files, home / "elsewhere").write(job)) == ()
    results = ResultFiles(store, files, home / "runs")
    (file_id,) = asyncio.run(results.write(job))
    assert asyncio.run(results.write(job)) == (file_id,)
    assert files.path(file_id).read_text() == (
        "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy\n"
        "1,1.52347,0.0,,\n2,1.5,0.25,1.25,0.5\n3,0.5,,,\n"
    )
    assert [(stored.id, stored.purpose, stored.filename) for stored in files.page(limit=9)[0]] == [
        (file_id, "fine-tune-results", "step_metrics.csv")
    ]

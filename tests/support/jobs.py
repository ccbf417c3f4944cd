"""A supervisor with real trainers and a stand-in for the engine, here or in a process that a test can kill.

`python -m tests.support.jobs HOME` takes up what HOME's database holds, and goes on until it is told to stop.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.database import Database
from service.jobs.job import Job
from service.jobs.promotion import Promoter
from service.jobs.store import JobStore
from service.jobs.supervisor import Supervisor
from service.jobs.trainer_process import TRAINER
from service.metrics import Metrics
from service.registry import Registry
from service.serving import Serving
from service.settings import Settings
from tests.support.runs import RECORDS
from tests.support.stub_engine import READY, StubEngine
from trainer.config import TrainingOptions

MODEL = "tiny"
SHORT = {
    "device": "cpu",
    "dtype": "fp32",
    "epochs": 2,
    "batch_size": 8,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0.01,
}
"""Four steps, two checkpoints."""
LONG = SHORT | {"epochs": 1000, "save_every_n_steps": 100_000}


@dataclass
class Bench:
    settings: Settings
    database: Database
    store: JobStore
    registry: Registry
    engine: StubEngine
    serving: Serving
    promoter: Promoter
    metrics: Metrics
    supervisor: Supervisor

    def columns(self, options: dict[str, Any], **overrides: Any) -> dict[str, Any]:
        """Arguments of `submit` for a job on RECORDS."""
        data = self.settings.data_dir / "records.jsonl"
        data.parent.mkdir(exist_ok=True)
        data.write_text("".join(json.dumps(record) + "\n" for record in RECORDS), encoding="utf-8")
        columns: dict[str, Any] = {
            "status": "queued",
            "model": MODEL,
            "options": TrainingOptions.model_validate(options),
            "data_files": ["data/records.jsonl"],
            "suffix": "",
            "promote": "final",
        }
        return columns | overrides

    def types(self, job: Job) -> list[str]:
        return [event["type"] for event in self.store.events(job.id)]

    async def until(self, job: Job, condition: Callable[[Job], object], timeout_s: float = 120) -> Job:
        async with asyncio.timeout(timeout_s):
            while not condition(self.store.get(job.id)):
                await asyncio.sleep(0.05)
        return self.store.get(job.id)

    async def finished(self, job: Job) -> Job:
        return await self.until(job, lambda now: now.finished)

    async def training(self, job: Job) -> Job:
        """Wait for the first step."""
        return await self.until(job, lambda now: now.progress.step is not None)


def make_bench(home: Path, *, command: Sequence[str] = TRAINER, **settings: Any) -> Bench:
    chosen = Settings(home=home, model=MODEL, cancel_grace_seconds=20, **settings)
    database = Database(chosen.database)
    store, metrics, engine = JobStore(database), Metrics(MODEL), StubEngine()
    registry = Registry(database, home=home, organization="tuneserve")
    serving = Serving(engine, registry, chosen, metrics)
    promoter = Promoter(store, registry, serving)
    supervisor = Supervisor(store, promoter, chosen, metrics, command=command)
    return Bench(chosen, database, store, registry, engine, serving, promoter, metrics, supervisor)


@asynccontextmanager
async def running_bench(home: Path, **options: Any) -> AsyncIterator[Bench]:
    """A bench that serves, and has taken up its jobs; at the end it is stopped as a service is."""
    bench = make_bench(home, **options)
    await bench.serving.on_engine_ready(READY)
    await bench.supervisor.start()
    try:
        yield bench
    finally:
        await bench.supervisor.stop()
        bench.database.close()


async def main(home: Path) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with running_bench(home):
        await stop.wait()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))

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
from service.jobs.arbiter import TrainerLimits
from service.jobs.ending import Ending, WriteResults, no_results
from service.jobs.job import Job
from service.jobs.launch import Launcher
from service.jobs.promotion import Promoter
from service.jobs.retention import Retention
from service.jobs.store import JobStore
from service.jobs.supervisor import Supervisor
from service.jobs.trainer_process import TRAINER
from service.jobs.webhooks import Webhooks
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
    arbiter: OneDevice
    webhooks: Webhooks
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


class OneDevice:
    """A stand-in for the arbiter: there is always room, and serving goes first. Keeps what was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.room = asyncio.Event()
        self.room.set()

    async def make_room(self, job: Job) -> None:
        self.asked.append(("make_room", job.id))
        await self.room.wait()

    async def give_back(self, job: Job) -> None:
        self.asked.append(("give_back", job.id))

    def limits(self, job: Job) -> TrainerLimits:
        return TrainerLimits(num_threads=1, nice=True)


def make_bench(
    home: Path, *, command: Sequence[str] = TRAINER, write_results: WriteResults = no_results, **settings: Any
) -> Bench:
    chosen = Settings(home=home, model=MODEL, cancel_grace_seconds=20, **settings)
    database = Database(chosen.database)
    store, metrics, engine, arbiter = JobStore(database), Metrics(MODEL), StubEngine(), OneDevice()
    registry = Registry(database, home=home, organization="tuneserve")
    serving = Serving(engine, registry, chosen, metrics)
    promoter = Promoter(store, registry, serving)
    webhooks = Webhooks(database, secret="secret", allow_private=True, delays_s=(0.1, 0.1))
    supervisor = Supervisor(
        store,
        promoter,
        Retention(store, registry, serving, chosen.runs_dir),
        Ending(store, promoter, webhooks, write_results),
        Launcher(registry, chosen, command=command),
        arbiter,
        chosen,
        metrics,
    )
    return Bench(chosen, database, store, registry, engine, serving, promoter, metrics, arbiter, webhooks, supervisor)


@asynccontextmanager
async def running_bench(home: Path, **options: Any) -> AsyncIterator[Bench]:
    """A bench that serves, and has taken up its jobs; at the end it is stopped as a service is."""
    bench = make_bench(home, **options)
    await bench.serving.on_engine_ready(READY)
    await bench.supervisor.start()
    bench.webhooks.start()
    try:
        yield bench
    finally:
        await bench.supervisor.stop()
        await bench.webhooks.stop()
        bench.database.close()


async def main(home: Path) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with running_bench(home):
        await stop.wait()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))

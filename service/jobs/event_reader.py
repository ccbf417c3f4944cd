"""From a trainer's events.jsonl into the store, the registry and the metrics."""

from __future__ import annotations

from service.jobs.promotion import Promoter
from service.jobs.retention import Retention
from service.jobs.store import JobStore
from service.metrics import Metrics
from trainer.run_folder import RunFolder

NOT_TOLD = ("paused",)
"""The service says it, when it is so: the trainer's own word comes before its end."""


class EventReader:
    def __init__(self, store: JobStore, promoter: Promoter, retention: Retention, metrics: Metrics) -> None:
        self._store = store
        self._promoter = promoter
        self._retention = retention
        self._metrics = metrics

    async def take(self, job_id: str, run: RunFolder) -> None:
        """What is new. It is in the store as a whole or not at all, with the checkpoints that it tells of."""
        job = self._store.get(job_id)
        events, offset = run.read_events(job.events_offset)
        if not events:
            return
        with self._store.database.transaction():
            told = [self._promoter.register(job, run.path, event) for event in events if event["type"] not in NOT_TOLD]
            progress = job.progress
            for event in told:
                progress = progress.after(event)
            self._store.record(job_id, told, events_offset=offset, progress=progress)
        steps = [event for event in told if event["type"] == "step"]
        if steps:
            self._metrics.job_step(steps[-1])
        if new := [event for event in told if "model" in event]:
            if not job.cancel_requested:
                await self._promoter.during(job, new[-1])
            await self._retention.keep_newest(job)

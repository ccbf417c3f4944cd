"""From a trainer's checkpoints to what answers: entries in the registry, and promotion by the job's own rule.

    final    the last checkpoint, once the job has come to its end (the default)
    best     the one with the lowest validation loss, at the same moment
    each     every checkpoint as it appears; of several that appear at once, the newest
    manual   none: POST /checkpoints/{id}/activate does it
A job that fails or is cancelled promotes nothing at its end.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from service.jobs.job import Job
from service.jobs.store import JobStore
from service.registry import Entry, Registry
from service.serving import Serving, SwapError
from trainer.run_folder import RunFolder

logger = logging.getLogger(__name__)

ENGINE_TIMEOUT_S = 300.0
"""How long a job's last promotion waits for an engine that is starting."""


class Promoter:
    def __init__(self, store: JobStore, registry: Registry, serving: Serving) -> None:
        self.store = store
        self.registry = registry
        self.serving = serving

    def register(self, job: Job, run_dir: Path, event: Mapping[str, Any]) -> Mapping[str, Any]:
        """Enter a `checkpoint` event's checkpoint, and add its id as `model` to the event.

        A merged LoRA model is not entered: its adapter, which is loaded onto the base, is.
        """
        if event["type"] != "checkpoint" or event["kind"] == "merged":
            return event
        weights = self._weights(job, run_dir) if event["kind"] == "adapter" else None
        return {**event, "model": self.registry.add_checkpoint(job, run_dir, event, weights=weights).id}

    def _weights(self, job: Job, run_dir: Path) -> Path | None:
        """The model that an adapter of the job stands on, where that is not its base model."""
        start = None if job.start_from is None else self.registry.get(job.start_from)
        if start is None or start.kind == "base":
            return None
        if job.merge_start and start.kind == "adapter":
            return RunFolder(run_dir).base
        own = start.base_dir
        return None if own == self.registry.bases().get(job.model) else own

    def result(self, job: Job) -> Entry | None:
        """The checkpoint that a succeeded job is about: its last one, or with `best` the best one."""
        entries = self.registry.of_job(job.id)
        if job.promote == "best":
            entries.sort(key=_goodness)
        else:
            entries.sort(key=lambda entry: entry.step or 0)
        return entries[-1] if entries else None

    async def during(self, job: Job, new: Mapping[str, Any]) -> None:
        """After a checkpoint event of a running job."""
        if job.promote == "each" and self.serving.gate.is_open:  # what sleeps gets the last one at the end
            await self._promote(job, self.registry.get(new["model"]), timeout_s=0)

    async def at_end(self, job: Job) -> None:
        """After success. Does nothing the second time, should the service have died in between."""
        entry = self.result(job)
        if entry is not None and job.promote != "manual" and not self.registry.was_promoted(entry.id):
            await self._promote(job, entry, timeout_s=ENGINE_TIMEOUT_S)

    async def _promote(self, job: Job, entry: Entry, *, timeout_s: float) -> None:
        if entry.base != self.serving.base:
            reason = f"the service serves {self.serving.base}, and this job trained {entry.base}"
            self.store.record(job.id, [{"type": "not_promoted", "model": entry.id, "message": reason}])
            return
        try:
            await self.serving.promote_when_serving(entry.id, f"job {job.id}", timeout_s)
        except SwapError as error:
            logger.error("%s could not be promoted: %s", entry.id, error)
            self.store.record(job.id, [{"type": "promotion_failed", "model": entry.id, "message": str(error)}])
        else:
            self.store.record(job.id, [{"type": "promoted", "model": entry.id}])


def _goodness(entry: Entry) -> tuple[bool, float]:
    """Ascending: the best is the last. What the trainer calls the best is it."""
    return entry.best, float("-inf") if entry.validation_loss is None else -entry.validation_loss

"""The end of a job: its last event, its error or its result, and whoever is told of it, in one transaction."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from service.jobs.job import Job, JobError, Status
from service.jobs.promotion import Promoter
from service.jobs.store import JobStore
from service.jobs.webhooks import Webhooks

logger = logging.getLogger(__name__)

WriteResults = Callable[[Job], Awaitable[tuple[str, ...]]]
"""Puts the metrics of a job that succeeds into files of /v1/files, and gives their ids. Doing it twice is harmless."""


async def no_results(job: Job) -> tuple[str, ...]:
    return ()


class Ending:
    def __init__(
        self, store: JobStore, promoter: Promoter, webhooks: Webhooks, write_results: WriteResults = no_results
    ) -> None:
        self._store = store
        self._promoter = promoter
        self._webhooks = webhooks
        self._write_results = write_results

    async def write_results(self, job: Job) -> None:
        """Before the end of a job that succeeded; a second time, after the service died in between, is harmless."""
        self._store.record(job.id, result_files=await self._write_results(job))

    def end(self, job_id: str, status: Status, error: JobError | None) -> None:
        job = self._store.get(job_id)
        event: dict[str, Any] = {"type": status}
        if error is not None:
            event |= {"code": error.code, "message": error.message, "param": error.param, "log_tail": error.log_tail}
        result = self._promoter.result(job) if status == "succeeded" else None
        if result is not None:
            event["fine_tuned_model"] = result.id
        with self._store.database.transaction():
            self._store.record(
                job_id,
                [event],
                status=status,
                paused=False,
                error=error,
                finished_at=time.time(),
                fine_tuned_model=result and result.id,
            )
            self._webhooks.add(self._store.get(job_id))
        self._webhooks.wake()
        logger.info("job %s: %s%s", job_id, status, f" ({error.code}: {error.message!r})" if error else "")

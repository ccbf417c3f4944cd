"""The jobs of the service: takes them, chooses which one starts, and does what clients ask of them.

A job's life: (validating_files ->) queued -> running -> succeeded | failed | cancelled. One job at a time on a device;
the others wait, by priority and then first come, first served. A pause puts a job back to `queued`, with `paused` set,
and frees its device; a resume lets it wait again, and its next trainer goes on where the last one was, in the same run
folder. A failed job can be resumed in the same way.

What a restart finds (`start`): a trainer that still lives is watched on to its end. One that wrote its result is
brought to its end, with registration and promotion, once. One that is neither goes on from its newest state, at most
`max_job_restarts` times. A graceful `stop` pauses the trainers and leaves their jobs to the next start. While the
database cannot be written, trainers go on, and their jobs wait for it.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from typing import Any

from lm.errors import UserError
from service.errors import conflict
from service.jobs import retry
from service.jobs.checking import check_files_aside
from service.jobs.ending import Ending
from service.jobs.event_reader import EventReader
from service.jobs.job import Job, JobError
from service.jobs.launch import Launcher
from service.jobs.policy import startable
from service.jobs.promotion import Promoter
from service.jobs.retention import Retention
from service.jobs.store import JobStore
from service.jobs.training import Arbiter, Training
from service.metrics import Metrics
from service.registry import Entry
from service.settings import Settings
from trainer.run_folder import RunFolder

logger = logging.getLogger(__name__)


class Supervisor:
    def __init__(
        self,
        store: JobStore,
        promoter: Promoter,
        retention: Retention,
        ending: Ending,
        launcher: Launcher,
        arbiter: Arbiter,
        settings: Settings,
        metrics: Metrics,
    ) -> None:
        self.store = store
        self._retention = retention
        self._ending = ending
        self._launcher = launcher
        self._settings = settings
        self._metrics = metrics
        reader = EventReader(store, promoter, retention, metrics)
        self._training = Training(store, promoter, ending, launcher, arbiter, reader, settings, on_free=self._schedule)

    async def start(self) -> None:
        """Take up what an earlier service process left."""
        await asyncio.to_thread(self._settings.runs_dir.mkdir, parents=True, exist_ok=True)
        self._retention.finish_deletions()
        for job in self.store.with_status("running"):
            self._training.take_up(job)
        await asyncio.sleep(0)  # by the end of which those have been taken up
        for job in self.store.with_status("validating_files"):
            self._training.spawn(job.id, self._check, job)
        self._schedule()

    async def stop(self, *, spare_adopted: bool = False) -> None:
        """Pause every trainer, or only those that were started here. The next start takes their jobs up."""
        await self._training.stop(spare_adopted=spare_adopted)

    # ---- what clients ask

    def submit(self, **columns: Any) -> Job:
        """Take a new job; the arguments are those of `JobStore.create`."""
        job = self.store.create(**columns)
        if job.status == "validating_files":
            self._training.spawn(job.id, self._check, job)
        self._schedule()
        return self.store.get(job.id)

    def cancel(self, job_id: str) -> Job:
        """End a job for good. A running one is `cancelled` as soon as its trainer has ended, within a step or so.

        Raises NotFoundError, and ApiError 409 for a job that is over.
        """
        job = self._unfinished(job_id, "cancelled")
        if job.status == "running":
            if not job.cancel_requested:
                self.store.record(job_id, [{"type": "cancelling"}], cancel_requested=True)
            self._training.cancel(job_id)
        else:
            self._ending.end(job_id, "cancelled", None)
            if job.status == "validating_files":
                self._training.abandon(job_id)
            else:
                self._training.spawn(job_id, self._training.forget_state, job)
            self._schedule()
        return self.store.get(job_id)

    def pause(self, job_id: str) -> Job:
        """Keep a job from training until it is resumed. A running one saves its state first, within a step or so, and
        is `queued` again then, with `paused` set. Again is fine.

        Raises NotFoundError, and ApiError 409 for a job that is over or is being cancelled.
        """
        job = self._unfinished(job_id, "paused")
        if job.cancel_requested:
            raise conflict(f"the job {job_id} cannot be paused: it is being cancelled")
        if job.status == "running" and not job.pause_requested:
            self.store.record(job_id, [{"type": "pausing"}], pause_requested=True)
            self._training.pause(job_id)
        elif job.status != "running" and not job.paused:
            self.store.record(job_id, [{"type": "paused"}], paused=True)
            self._schedule()
        return self.store.get(job_id)

    def resume(self, job_id: str) -> Job:
        """Let a paused job wait for its device again, or a failed one, and go on from its newest state. A job that waits
        or trains anyway stays as it is.

        Raises NotFoundError, and ApiError 409 for a job that has succeeded or was cancelled.
        """
        job = self.store.get(job_id)
        if job.status in ("succeeded", "cancelled"):
            raise conflict(f"the job {job_id} cannot be resumed: it is {job.status}")
        if job.status == "failed":
            self._begin_again(job)
        elif job.paused:
            self.store.record(job_id, [{"type": job.status, "message": "resumed"}], paused=False)
        elif job.pause_requested:  # its trainer is saving its state, and is followed by another one
            self.store.record(job_id, [{"type": "running", "message": "resumed"}], pause_requested=False)
        self._schedule()
        return self.store.get(job_id)

    async def delete(self, job_id: str) -> None:
        """Remove a job with its checkpoints and files. Raises NotFoundError, and ApiError 409 for one that runs, and
        for one with a checkpoint that is needed."""
        await self._retention.remove_job(self.store.get(job_id))
        self._schedule()

    async def delete_checkpoint(self, entry_id: str) -> Entry:
        """Remove one model that a job made, with its files. Raises NotFoundError, and ApiError 409 for one in use."""
        return await self._retention.remove_checkpoint(entry_id)

    def run_folder(self, job: Job) -> RunFolder:
        """The folder of the job's run; it may not exist yet."""
        return self._launcher.run_folder(job)

    def _unfinished(self, job_id: str, participle: str) -> Job:
        job = self.store.get(job_id)
        is_ending = job.status == "running" and not self._training.can_be_interrupted(job_id)
        if job.finished or is_ending:
            state = "its training is over" if is_ending else f"it has {job.status} already"
            raise conflict(f"the job {job_id} cannot be {participle}: {state}")
        return job

    def _begin_again(self, job: Job) -> None:
        was_checked = job.started_at is not None
        status, number = ("queued", job.attempt + 1) if was_checked else ("validating_files", job.attempt)
        reset = {
            "error": None,
            "finished_at": None,
            "pid": None,
            "restarts": 0,
            "paused": False,
            "pause_requested": False,
            "cancel_requested": False,
        }
        event = {"type": status, "message": "resumed"}
        self.store.record(job.id, [event], status=status, attempt=number, **reset)
        if not was_checked:
            self._training.spawn(job.id, self._check, job)

    # ---- before a job trains

    async def _check(self, job: Job) -> None:
        try:
            for dataset in job.local_sets:
                files = [(self._settings.home / file, file.removeprefix("data/")) for file in dataset.data_files or ()]
                reading = dataset.reading(job.options.reading)
                await check_files_aside(files, param="dataset.data_files", reading=reading)
        except UserError as error:
            failure = JobError(code="invalid_training_file", message=str(error), param=error.param)
            self._ending.end(job.id, "failed", failure)
        else:
            self.store.record(job.id, [{"type": "queued"}], status="queued")
        self._schedule()

    def _schedule(self) -> None:
        """Start what can be started now; later, should the database not take that now."""
        if self._training.is_stopping:
            return
        try:
            while ready := startable(self.store.queue(), self.store.with_status("running")):
                job = ready[0]
                started_at = job.started_at or time.time()
                self.store.record(job.id, [{"type": "running"}], status="running", started_at=started_at)
                self._training.begin(job)
            self._metrics.jobs(self.store.counts())
        except sqlite3.OperationalError as error:
            logger.error("no job can be started now: %s", error)
            asyncio.get_running_loop().call_later(retry.RETRY_S, self._schedule)

"""Starts jobs, watches them to their end, and takes them up again after a pause or a restart of the service.

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
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from lm.errors import UserError
from service.errors import conflict
from service.jobs import retry
from service.jobs.arbiter import TrainerLimits
from service.jobs.checking import check_files_aside
from service.jobs.disk import NoDiskSpaceError
from service.jobs.ending import Ending
from service.jobs.event_reader import EventReader
from service.jobs.job import Job, JobError
from service.jobs.launch import Launcher
from service.jobs.policy import next_step, outcome, startable
from service.jobs.promotion import Promoter
from service.jobs.retention import Retention
from service.jobs.store import JobStore
from service.jobs.trainer_process import TrainerProcess
from service.metrics import Metrics
from service.registry import Entry
from service.settings import Settings
from trainer.run_folder import RunFolder, RunResult

logger = logging.getLogger(__name__)

POLL_S = 0.1
KILL_S = 5.0
"""How long a killed trainer may take to be gone."""


class Arbiter(Protocol):
    """What is needed of the DeviceArbiter."""

    async def make_room(self, job: Job) -> None: ...

    async def give_back(self, job: Job) -> None: ...

    def limits(self, job: Job) -> TrainerLimits: ...


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
        self._promoter = promoter
        self._retention = retention
        self._ending = ending
        self._launcher = launcher
        self._arbiter = arbiter
        self._settings = settings
        self._metrics = metrics
        self._reader = EventReader(store, promoter, retention, metrics)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._rooms: dict[str, asyncio.Task[None]] = {}
        """Of jobs whose trainer is about to be started: the wait for room on the device."""
        self._trainers: dict[str, TrainerProcess] = {}
        self._stopping = False

    async def start(self) -> None:
        """Take up what an earlier service process left."""
        await asyncio.to_thread(self._settings.runs_dir.mkdir, parents=True, exist_ok=True)
        self._retention.finish_deletions()
        for job in self.store.with_status("running"):
            self._spawn(job.id, self._take_up, job)
        await asyncio.sleep(0)  # by the end of which those have been taken up
        for job in self.store.with_status("validating_files"):
            self._spawn(job.id, self._check, job)
        self._schedule()

    async def stop(self, *, spare_adopted: bool = False) -> None:
        """Pause every trainer, or only those that were started here. The next start takes their jobs up."""
        self._stopping = True
        ending = {name: t for name, t in self._trainers.items() if not (spare_adopted and t.is_adopted)}
        for trainer in ending.values():
            trainer.pause(self._settings.cancel_grace_seconds)
        for room in self._rooms.values():
            room.cancel()
        last_moment = time.monotonic() + self._settings.cancel_grace_seconds + KILL_S
        while (self._rooms or ending.keys() & self._trainers.keys()) and time.monotonic() < last_moment:
            await asyncio.sleep(POLL_S)
        tasks = [*self._tasks.values()]
        for task in tasks:
            task.cancel()  # a check, or a last promotion: the next start does it
        await asyncio.gather(*tasks, return_exceptions=True)

    # ---- what clients ask

    def submit(self, **columns: Any) -> Job:
        """Take a new job; the arguments are those of `JobStore.create`."""
        job = self.store.create(**columns)
        if job.status == "validating_files":
            self._spawn(job.id, self._check, job)
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
            self._interrupt(job_id, lambda trainer: trainer.terminate(self._settings.cancel_grace_seconds))
        else:
            self._ending.end(job_id, "cancelled", None)
            if job.status == "validating_files":
                self._tasks[job_id].cancel()
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
            self._interrupt(job_id, TrainerProcess.pause)
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
        is_ending = job.status == "running" and not (job_id in self._trainers or job_id in self._rooms)
        if job.finished or is_ending:
            state = "its training is over" if is_ending else f"it has {job.status} already"
            raise conflict(f"the job {job_id} cannot be {participle}: {state}")
        return job

    def _interrupt(self, job_id: str, how: Callable[[TrainerProcess], None]) -> None:
        """What waits for room ends its wait; what trains is told."""
        if room := self._rooms.get(job_id):
            room.cancel()
        elif trainer := self._trainers.get(job_id):
            how(trainer)

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
        }
        event = {"type": status, "message": "resumed"}
        self.store.record(job.id, [event], status=status, attempt=number, **reset)
        if not was_checked:
            self._spawn(job.id, self._check, job)

    # ---- a job's life

    async def _check(self, job: Job) -> None:
        try:
            for dataset in job.local_sets:
                files = [(self._settings.home / file, file.removeprefix("data/")) for file in dataset.data_files or ()]
                reading = dataset.reading(job.options.reading)
                await check_files_aside(files, param="dataset.data_files", reading=reading)
        except UserError as error:
            await self._fail(job.id, "invalid_training_file", str(error), error.param)
        else:
            self.store.record(job.id, [{"type": "queued"}], status="queued")
            self._schedule()

    def _schedule(self) -> None:
        """Start what can be started now; later, should the database not take that now."""
        if self._stopping:
            return
        try:
            while ready := startable(self.store.queue(), self.store.with_status("running")):
                job = ready[0]
                started_at = job.started_at or time.time()
                self.store.record(job.id, [{"type": "running"}], status="running", started_at=started_at)
                self._rooms[job.id] = asyncio.create_task(self._arbiter.make_room(job))
                self._spawn(job.id, self._start, job.id)
            self._metrics.jobs(self.store.counts())
        except sqlite3.OperationalError as error:
            logger.error("no job can be started now: %s", error)
            asyncio.get_running_loop().call_later(retry.RETRY_S, self._schedule)

    async def _start(self, job_id: str) -> None:
        """From a free device to a trainer. The job counts as running before there is a process, never after."""
        job = self.store.get(job_id)
        failure: JobError | None = None
        try:
            await asyncio.wait([self._rooms[job_id]])
            room, job = self._rooms[job_id], self.store.get(job_id)
            if not room.cancelled():
                room.result()
            if not (self._stopping or job.cancel_requested or job.pause_requested):
                self._follow(job, self._launcher.launch(job, self._arbiter.limits(job)))
                return
        except UserError as error:
            code = "no_disk_space" if isinstance(error, NoDiskSpaceError) else "invalid_config"
            failure = JobError(code=code, message=str(error), param=error.param)
        except sqlite3.OperationalError:
            raise
        except Exception as error:
            logger.exception("job %s could not be started", job_id)
            reason = error.strerror if isinstance(error, OSError) else "the log of the service has the reason"
            failure = JobError(code="internal_error", message=f"the trainer could not be started: {reason}")
        await self._not_started(job, failure)

    async def _not_started(self, job: Job, failure: JobError | None) -> None:
        await self._arbiter.give_back(job)
        if job.cancel_requested:
            self._ending.end(job.id, "cancelled", None)
        elif failure is not None:
            self._ending.end(job.id, "failed", failure)
        else:
            self._wait_again(job, paused=job.pause_requested)
        self._rooms.pop(job.id, None)
        self._schedule()

    def _follow(self, job: Job, trainer: TrainerProcess) -> None:
        self._trainers[job.id] = trainer
        self._rooms.pop(job.id, None)
        self._spawn(job.id, self._watch, job.id, trainer)

    async def _watch(self, job_id: str, trainer: TrainerProcess) -> None:
        """Copy the trainer's events until it has ended, and then see what becomes of the job."""
        job = self.store.get(job_id)
        try:
            if job.pid != trainer.pid:
                self.store.record(job_id, pid=trainer.pid)
            ended = False
            while not ended:
                ended = trainer.has_ended()  # asked before reading, so that nothing is left unread
                await self._reader.take(job_id, trainer.run)
                if not ended:
                    await asyncio.sleep(POLL_S)
            await asyncio.to_thread(trainer.run.remove_unfinished)
        except sqlite3.OperationalError:
            raise  # and here we are again soon; the trainer goes on meanwhile
        except Exception:
            trainer.kill()
            self._trainers.pop(job_id, None)
            await self._arbiter.give_back(job)
            raise
        self._trainers.pop(job_id, None)  # where this is not the first time, it has gone already
        await self._arbiter.give_back(job)
        await self._after(self.store.get(job_id), trainer)
        self._schedule()

    async def _after(self, job: Job, trainer: TrainerProcess) -> None:
        result, service_left = trainer.run.read_result(), self._stopping or trainer.found_dead
        next_ = next_step(job, result, exit_code=trainer.exit_code, service_left=service_left)
        if next_ == "end":
            await self._finish(job, trainer, result)
        elif next_ == "go on after a death" and job.restarts >= self._settings.max_job_restarts:
            message = f"its trainer died {job.restarts + 1} times while the service was away; max_job_restarts is "
            error = JobError(
                code="too_many_restarts", message=f"{message}{job.restarts}", log_tail=trainer.run.log_tail()
            )
            self._ending.end(job.id, "failed", error)
        else:
            died = next_ == "go on after a death"
            self._wait_again(job, paused=next_ == "pause", attempt=job.attempt + 1, restarts=job.restarts + died)

    async def _finish(self, job: Job, trainer: TrainerProcess, result: RunResult | None) -> None:
        status, error = outcome(
            result,
            exit_code=trainer.exit_code,
            cancel_requested=job.cancel_requested,
            log_tail=trainer.run.log_tail(),
        )
        if status == "succeeded" and not trainer.run.events.exists():
            status, error = "failed", JobError(code="internal_error", message="its run folder was removed while it ran")
        if status == "succeeded":
            await self._promoter.at_end(job)
        self._ending.end(job.id, status, error)

    def _wait_again(self, job: Job, *, paused: bool, **columns: Any) -> None:
        event = {"type": "paused"} if paused else {"type": "queued", "message": "it goes on from where it was"}
        self.store.record(job.id, [event], status="queued", paused=paused, pause_requested=False, pid=None, **columns)

    async def _fail(self, job_id: str, code: str, message: str, param: str | None = None) -> None:
        self._ending.end(job_id, "failed", JobError(code=code, message=message, param=param))
        self._schedule()

    async def _take_up(self, job: Job) -> None:
        """A job that ran when an earlier service process ended."""
        trainer = TrainerProcess.adopt(self.run_folder(job), job.pid)
        if job.cancel_requested:
            trainer.terminate(self._settings.cancel_grace_seconds)
        elif job.pause_requested:
            trainer.pause()
        self._follow(job, trainer)

    def _spawn(self, job_id: str, work: Callable[..., Awaitable[None]], *arguments: Any) -> None:
        """Go on with a job in the background. A mistake of ours ends this job, not the supervisor."""

        async def guarded() -> None:
            try:
                await retry.until_written(work, *arguments)
            except Exception:
                logger.exception("job %s failed in the service", job_id)
                message = "the service failed to run this job; its log has the reason"
                await retry.until_written(self._fail, job_id, "internal_error", message)

        task = self._tasks[job_id] = asyncio.create_task(guarded(), name=job_id)
        task.add_done_callback(lambda done: self._tasks.pop(job_id) if self._tasks.get(job_id) is done else None)

"""Starts jobs, watches them to their end, and takes them up again after a restart of the service.

A job's life: (validating_files ->) queued -> running -> succeeded | failed | cancelled. One job at a time on a device;
the others wait, first come, first served.

What a restart finds (`start`): a trainer that still lives is watched on to its end. One that wrote its result is
brought to its end, with registration and promotion, once. One that is neither is queued again from its beginning, in a
new run folder, at most `max_job_restarts` times. A graceful `stop` ends the trainers and leaves their jobs to the next
start in the same way. While the database cannot be written, trainers go on, and their jobs wait for it.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import yaml

from lm.errors import UserError
from service.errors import conflict
from service.jobs import retry
from service.jobs.checking import check_files_aside
from service.jobs.job import Job, JobError, Progress, Status
from service.jobs.policy import outcome, run_config, startable
from service.jobs.promotion import Promoter
from service.jobs.store import JobStore
from service.jobs.trainer_process import TRAINER, TrainerProcess, is_alive
from service.metrics import Metrics
from service.settings import Settings
from trainer.run_folder import RunFolder

logger = logging.getLogger(__name__)

POLL_S = 0.1
KILL_S = 5.0
"""How long a killed trainer may take to be gone."""


class Supervisor:
    def __init__(
        self,
        store: JobStore,
        promoter: Promoter,
        settings: Settings,
        metrics: Metrics,
        *,
        command: Sequence[str] = TRAINER,
    ) -> None:
        self.store = store
        self._promoter = promoter
        self._settings = settings
        self._metrics = metrics
        self._command = command
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._trainers: dict[str, TrainerProcess] = {}
        self._stopping = False

    async def start(self) -> None:
        """Take up what an earlier service process left."""
        for job in self.store.with_status("running"):
            self._spawn(job.id, self._take_up, job)
        await asyncio.sleep(0)  # by the end of which those have been taken up
        for job in self.store.with_status("validating_files"):
            self._spawn(job.id, self._check, job)
        self._schedule()

    async def stop(self, *, spare_adopted: bool = False) -> None:
        """End every trainer, or only those that were started here. Jobs that they did not finish are queued again."""
        self._stopping = True
        ending = {name: t for name, t in self._trainers.items() if not (spare_adopted and t.is_adopted)}
        for trainer in ending.values():
            trainer.terminate(self._settings.cancel_grace_seconds)
        last_moment = time.monotonic() + self._settings.cancel_grace_seconds + KILL_S
        while ending.keys() & self._trainers.keys() and time.monotonic() < last_moment:
            await asyncio.sleep(POLL_S)
        tasks = [*self._tasks.values()]
        for task in tasks:
            task.cancel()  # a check, or a last promotion: the next start does it
        await asyncio.gather(*tasks, return_exceptions=True)

    def submit(self, **columns: Any) -> Job:
        """Take a new job; the arguments are those of `JobStore.create`."""
        job = self.store.create(**columns)
        if job.status == "validating_files":
            self._spawn(job.id, self._check, job)
        self._schedule()
        return self.store.get(job.id)

    def cancel(self, job_id: str) -> Job:
        """End a job. A running one is `cancelled` as soon as its trainer has ended, within a step or so.

        Raises NotFoundError, and ApiError 409 for a job that is over.
        """
        job = self.store.get(job_id)
        trainer = self._trainers.get(job_id)
        if job.finished or (job.status == "running" and trainer is None):
            state = "its training is over" if job.status == "running" else f"it has {job.status} already"
            raise conflict(f"the job {job_id} cannot be cancelled: {state}")
        if trainer is not None:
            if not job.cancel_requested:
                self.store.record(job_id, [{"type": "cancelling"}], cancel_requested=True)
            trainer.terminate(self._settings.cancel_grace_seconds)
        else:
            self._end(job_id, "cancelled", None)
            if job.status == "validating_files":
                self._tasks[job_id].cancel()
            self._schedule()
        return self.store.get(job_id)

    def run_folder(self, job: Job) -> RunFolder:
        """The folder of the job's current attempt; it may not exist yet."""
        return RunFolder(self._settings.runs_dir / job.run_name)

    # ---- a job's life

    async def _check(self, job: Job) -> None:
        files = [(self._settings.home / file, file.removeprefix("data/")) for file in job.data_files]
        try:
            await check_files_aside(files, param="dataset.data_files", reading=job.options.reading)
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
            while ready := startable(self.store.with_status("queued"), self.store.with_status("running")):
                self._start(ready[0])
            self._metrics.jobs(self.store.counts())
        except sqlite3.OperationalError as error:
            logger.error("no job can be started now: %s", error)
            asyncio.get_running_loop().call_later(retry.RETRY_S, self._schedule)

    def _start(self, job: Job) -> None:
        """Leaves the job running, or failing. It counts as running before there is a process, never after."""
        self.store.record(job.id, [{"type": "running"}], status="running", started_at=job.started_at or time.time())
        try:
            trainer = self._launch(job)
        except UserError as error:
            self._spawn(job.id, self._fail, job.id, "invalid_config", str(error), error.param)
        except Exception as error:
            logger.exception("job %s could not be started", job.id)
            reason = error.strerror if isinstance(error, OSError) else "the log of the service has the reason"
            self._spawn(job.id, self._fail, job.id, "internal_error", f"the trainer could not be started: {reason}")
        else:
            self._follow(job, trainer)
            self.store.record(job.id, pid=trainer.pid)

    def _launch(self, job: Job) -> TrainerProcess:
        base = self._promoter.registry.base_folder(job.model)
        config = run_config(job, base=base, home=self._settings.home).model_dump(mode="json")
        run = self.run_folder(job)
        run.path.mkdir(parents=True, exist_ok=True)
        run.config.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), "utf-8")
        return TrainerProcess.start(run, nice=self._shares_cpu(job), command=self._command)

    def _follow(self, job: Job, trainer: TrainerProcess) -> None:
        self._trainers[job.id] = trainer
        self._spawn(job.id, self._watch, job.id, trainer)

    async def _watch(self, job_id: str, trainer: TrainerProcess) -> None:
        """Copy the trainer's events until it has ended, and then end the job or leave it to the next start."""
        try:
            ended = False
            while not ended:
                ended = trainer.has_ended()  # asked before reading, so that nothing is left unread
                await self._take_events(job_id, trainer.run)
                if not ended:
                    await asyncio.sleep(POLL_S)
            await asyncio.to_thread(trainer.run.remove_unfinished)
        except sqlite3.OperationalError:
            raise  # and here we are again soon; the trainer goes on meanwhile
        except Exception:
            trainer.kill()
            self._trainers.pop(job_id, None)
            raise
        self._trainers.pop(job_id, None)  # where this is not the first time, it has gone already
        job, result = self.store.get(job_id), trainer.run.read_result()
        if self._stopping and not job.cancel_requested and (result is None or result.status == "cancelled"):
            self._queue_again(job)
            return
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
        self._end(job_id, status, error)
        self._schedule()

    async def _take_events(self, job_id: str, run: RunFolder) -> None:
        job = self.store.get(job_id)
        events, offset = run.read_events(job.events_offset)
        if not events:
            return
        with self.store.database.transaction():
            told = [self._promoter.register(job, run.path, event) for event in events]
            progress = job.progress
            for event in told:
                progress = progress.after(event)
            self.store.record(job_id, told, events_offset=offset, progress=progress)
        steps = [event for event in told if event["type"] == "step"]
        if steps:
            self._metrics.job_step(steps[-1])
        if (new := [event for event in told if "model" in event]) and not job.cancel_requested:
            await self._promoter.during(job, new[-1])

    async def _fail(self, job_id: str, code: str, message: str, param: str | None = None) -> None:
        self._end(job_id, "failed", JobError(code=code, message=message, param=param))
        self._schedule()

    def _end(self, job_id: str, status: Status, error: JobError | None) -> None:
        job = self.store.get(job_id)
        event: dict[str, Any] = {"type": status}
        if error is not None:
            event |= {"code": error.code, "message": error.message, "param": error.param, "log_tail": error.log_tail}
        result = self._promoter.result(job) if status == "succeeded" else None
        if result is not None:
            event["fine_tuned_model"] = result.id
        self.store.record(
            job_id,
            [event],
            status=status,
            error=error,
            finished_at=time.time(),
            fine_tuned_model=result and result.id,
        )
        logger.info("job %s: %s%s", job_id, status, f" ({error.code}: {error.message!r})" if error else "")

    # ---- restarts

    async def _take_up(self, job: Job) -> None:
        run = self.run_folder(job)
        trainer = TrainerProcess.adopt(run, job.pid)
        if is_alive(run):
            if job.cancel_requested:
                trainer.terminate(self._settings.cancel_grace_seconds)
            self._follow(job, trainer)
        elif job.cancel_requested or ((result := run.read_result()) is not None and result.status != "cancelled"):
            self._follow(job, trainer)
        else:
            run.remove_unfinished()
            self._queue_again(job)
            self._schedule()

    def _queue_again(self, job: Job) -> None:
        restarts = job.attempt
        if restarts > self._settings.max_job_restarts:
            message = f"the service was stopped {restarts} times during this job; max_job_restarts is {restarts - 1}"
            self._end(job.id, "failed", JobError(code="too_many_restarts", message=message))
            return
        self.store.record(
            job.id,
            [{"type": "queued", "message": "the service was stopped during the job; it begins again"}],
            status="queued",
            attempt=job.attempt + 1,
            pid=None,
            events_offset=0,
            progress=Progress(),
        )

    # ---- details

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

    def _shares_cpu(self, job: Job) -> bool:
        """Whether training and serving want the same cores."""
        ready = self._promoter.serving.engine.ready
        device = job.options.device
        return device == "cpu" or (device == "auto" and (ready is None or ready.device == "cpu"))

"""Jobs at work: from a free device over a trainer that is watched to whatever comes after it.

Decides neither which job starts nor whether one may be stopped: the supervisor does.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from lm.errors import UserError
from service.jobs import retry
from service.jobs.arbiter import TrainerLimits
from service.jobs.disk import NoDiskSpaceError
from service.jobs.ending import Ending
from service.jobs.event_reader import EventReader
from service.jobs.job import Job, JobError
from service.jobs.launch import Launcher
from service.jobs.policy import next_step, outcome
from service.jobs.promotion import Promoter
from service.jobs.store import JobStore
from service.jobs.trainer_process import TrainerProcess
from service.settings import Settings
from trainer.run_folder import RunResult

logger = logging.getLogger(__name__)

POLL_S = 0.1
KILL_S = 5.0
"""How long a killed trainer may take to be gone."""


class Arbiter(Protocol):
    """What is needed of the DeviceArbiter."""

    async def make_room(self, job: Job) -> None: ...

    async def give_back(self, job: Job) -> None: ...

    def limits(self, job: Job) -> TrainerLimits: ...


class Training:
    def __init__(
        self,
        store: JobStore,
        promoter: Promoter,
        ending: Ending,
        launcher: Launcher,
        arbiter: Arbiter,
        reader: EventReader,
        settings: Settings,
        *,
        on_free: Callable[[], None],
    ) -> None:
        """`on_free` is called when a device may have become free."""
        self._store = store
        self._promoter = promoter
        self._ending = ending
        self._launcher = launcher
        self._arbiter = arbiter
        self._reader = reader
        self._settings = settings
        self._on_free = on_free
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._rooms: dict[str, asyncio.Task[None]] = {}
        """Of jobs whose trainer is about to be started: the wait for room on the device."""
        self._trainers: dict[str, TrainerProcess] = {}
        self.is_stopping = False

    def begin(self, job: Job) -> None:
        """Start the trainer of a job that is `running` in the store."""
        self._rooms[job.id] = asyncio.create_task(retry.until_written(self._arbiter.make_room, job))
        self.spawn(job.id, self._start, job.id)

    def take_up(self, job: Job) -> None:
        """Go on with a job that was `running` when an earlier service process ended."""
        self.spawn(job.id, self._take_up, job)

    async def _take_up(self, job: Job) -> None:
        trainer = TrainerProcess.adopt(self._launcher.run_folder(job), job.pid)
        if job.cancel_requested:
            trainer.terminate(self._settings.cancel_grace_seconds)
        elif job.pause_requested:
            trainer.pause()
        self._follow(job, trainer)

    def can_be_interrupted(self, job_id: str) -> bool:
        """False once its trainer has ended, whatever is left to do."""
        return job_id in self._trainers or job_id in self._rooms

    def cancel(self, job_id: str) -> None:
        """Note `cancel_requested` first."""
        self._interrupt(job_id, lambda trainer: trainer.terminate(self._settings.cancel_grace_seconds))

    def pause(self, job_id: str) -> None:
        """Note `pause_requested` first."""
        self._interrupt(job_id, TrainerProcess.pause)

    def _interrupt(self, job_id: str, how: Callable[[TrainerProcess], None]) -> None:
        """What waits for room ends its wait; what trains is told."""
        if room := self._rooms.get(job_id):
            room.cancel()
        elif trainer := self._trainers.get(job_id):
            how(trainer)

    async def stop(self, *, spare_adopted: bool) -> None:
        """Pause every trainer, or only those that were started here, and end all other work."""
        self.is_stopping = True
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

    def spawn(self, job_id: str, work: Callable[..., Awaitable[None]], *arguments: Any) -> None:
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

    def abandon(self, job_id: str) -> None:
        """End what was spawned for a job."""
        self._tasks[job_id].cancel()

    async def forget_state(self, job: Job) -> None:
        """Of a job that was cancelled: it is never resumed."""
        await asyncio.to_thread(self._launcher.run_folder(job).remove_state)

    async def _fail(self, job_id: str, code: str, message: str) -> None:
        self._ending.end(job_id, "failed", JobError(code=code, message=message))
        self._on_free()

    # ---- from a free device to a trainer

    async def _start(self, job_id: str) -> None:
        """From a free device to a trainer. The job counts as running before there is a process, never after."""
        job = self._store.get(job_id)
        failure: JobError | None = None
        try:
            await asyncio.wait([self._rooms[job_id]])
            room, job = self._rooms[job_id], self._store.get(job_id)
            if not room.cancelled():  # as by a pause, also one that was taken back meanwhile: the job waits again then
                room.result()
                if not (self.is_stopping or job.cancel_requested or job.pause_requested):
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
            await self.forget_state(job)
            self._ending.end(job.id, "cancelled", None)
        elif failure is not None:
            self._ending.end(job.id, "failed", failure)
        else:
            self._wait_again(job, paused=job.pause_requested)
        self._rooms.pop(job.id, None)
        self._on_free()

    def _follow(self, job: Job, trainer: TrainerProcess) -> None:
        self._trainers[job.id] = trainer
        self._rooms.pop(job.id, None)
        self.spawn(job.id, self._watch, job.id, trainer)

    async def _watch(self, job_id: str, trainer: TrainerProcess) -> None:
        """Copy the trainer's events until it has ended, and then see what becomes of the job."""
        job = self._store.get(job_id)
        try:
            if job.pid != trainer.pid:
                self._store.record(job_id, pid=trainer.pid)
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
        await self._after(self._store.get(job_id), trainer)
        self._on_free()

    async def _after(self, job: Job, trainer: TrainerProcess) -> None:
        result, service_left = trainer.run.read_result(), self.is_stopping or trainer.found_dead
        next_ = next_step(job, result, exit_code=trainer.exit_code, service_left=service_left)
        died = next_ == "go on after a death" and job.pid is not None
        if next_ == "end":
            await self._finish(job, trainer, result)
        elif died and job.restarts >= self._settings.max_job_restarts:
            message = f"its trainer died {job.restarts + 1} times while the service was away; max_job_restarts is "
            error = JobError(
                code="too_many_restarts", message=f"{message}{job.restarts}", log_tail=trainer.run.log_tail()
            )
            self._ending.end(job.id, "failed", error)
        else:
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
            await self._ending.write_results(job)
        if status == "cancelled":
            await self.forget_state(job)
        self._ending.end(job.id, status, error)

    def _wait_again(self, job: Job, *, paused: bool, **columns: Any) -> None:
        event = {"type": "paused"} if paused else {"type": "queued", "message": "it goes on from where it was"}
        self._store.record(job.id, [event], status="queued", paused=paused, pause_requested=False, pid=None, **columns)

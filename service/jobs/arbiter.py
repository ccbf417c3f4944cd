"""Who has a device while a job trains on it: the trainer, the engine, or both. The only one who decides that.

    apart    they use different devices
    share    both run, each within its part; on a CPU the trainer lets others go first and takes fewer threads
    sleep    the engine gives everything back, and returns when no job needs that any more

`plan` decides, without doing anything. `make_room` before a trainer starts, `limits` for what it is started with, and
`give_back` when it has ended, however it did, follow from it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import ceil
from typing import Literal

from lm.config import load_config
from lm.errors import NotFoundError
from service.engine.messages import EngineReady
from service.engine_client import EngineClient
from service.jobs.job import Job
from service.jobs.policy import may_collide
from service.jobs.store import JobStore
from service.jobs.trainer_process import is_alive
from service.registry import Registry
from service.settings import Settings
from service.sleep import EngineSleep
from trainer.estimate import Precision, estimate_memory
from trainer.run_folder import RunFolder

logger = logging.getLogger(__name__)

Mode = Literal["apart", "share", "sleep"]

EVENT = "serving_sleeps"
"""Of a job that the engine sleeps for; a restart of the service finds it."""
USABLE_SHARE = 0.95
"""Of a device's memory; the driver and fragmentation take the rest."""
GB = 1e9

Needs = Callable[[Job, str], int]
"""Bytes that a job will take of a device, by estimate. Raises what reading a model folder does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingPlan:
    """What becomes of serving while a job trains."""

    mode: Mode
    reason: str
    memory_fraction: float | None = None
    """What the trainer may take of the device's memory; None is all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerLimits:
    """What a trainer may take of its machine. None is all of it."""

    num_threads: int | None = None
    memory_fraction: float | None = None
    """Of the device's memory."""
    nice: bool = False
    """Whether others on the CPU go first."""


class DeviceArbiter:
    def __init__(
        self,
        engine: EngineClient,
        sleep: EngineSleep,
        store: JobStore,
        settings: Settings,
        *,
        needs: Needs,
    ) -> None:
        self._engine = engine
        self._sleep = sleep
        self._store = store
        self._settings = settings
        self._needs = needs
        self._plans: dict[str, ServingPlan] = {}
        """Of the jobs that room was made for."""

    def take_up(self, training: Iterable[Job]) -> None:
        """Before the engine first starts: jobs whose trainers have outlived an earlier service. One that the engine
        slept for has the device still."""
        for job in training:
            if self._slept_for(job) and is_alive(RunFolder(self._settings.runs_dir / job.run_name)):
                self._plans[job.id] = ServingPlan(mode="sleep", reason="it trains since before the service started")
                self._sleep.begin_asleep(_why(job), seconds_left=self._seconds_left(job))

    async def start_engine(self) -> None:
        """The first start, unless it sleeps."""
        if not self._sleepers:
            await self._engine.start()

    async def make_room(self, job: Job) -> None:
        """Await this before the trainer of `job` starts: afterwards the device has room for it.

        `give_back` must follow, also where this was cancelled or the trainer was never started.
        """
        await self._engine.settled()  # by then it knows its device
        plan = self._plans[job.id] = self.plan(job)
        logger.info("job %s and serving: %s (%s)", job.id, plan.mode, plan.reason)
        if plan.mode == "sleep":
            event = {"type": EVENT, "attempt": job.attempt, "message": f"the engine sleeps meanwhile: {plan.reason}"}
            self._store.record(job.id, [event])
            await self._sleep.fall_asleep(_why(job), seconds_left=self._seconds_left(job))

    async def give_back(self, job: Job) -> None:
        """The trainer of `job` has ended, or will not start. Returns at once; doing it twice does nothing."""
        plan = self._plans.pop(job.id, None)
        if plan is not None and plan.mode == "sleep" and not self._sleepers:
            self._sleep.wake()

    def limits(self, job: Job) -> TrainerLimits:
        """What the trainer of `job` is started with, once there is room."""
        plan = self._plans.get(job.id) or self.plan(job)
        if plan.mode == "share" and self._serving_device == "cpu":
            return TrainerLimits(num_threads=self._settings.training_num_threads or _trainer_threads(), nice=True)
        return TrainerLimits(memory_fraction=plan.memory_fraction)

    def plan(self, job: Job, needed_bytes: int | None = None) -> ServingPlan:
        """What would become of serving if `job` trained now. `needed_bytes` where the caller has an estimate."""
        wanted = self._settings.serving_while_training
        if not may_collide(job.options.device, self._serving_device):
            return ServingPlan(mode="apart", reason=f"the engine is on {self._serving_device}")
        if wanted == "sleep":
            return ServingPlan(mode="sleep", reason="serving_while_training is sleep")
        if self._serving_device == "cpu":
            return ServingPlan(mode="share", reason="both compute on the CPU")
        if wanted == "share":
            share = self._settings.training_memory_share
            return ServingPlan(mode="share", reason="serving_while_training is share", memory_fraction=share)
        return self._plan_by_memory(job, needed_bytes)

    def _plan_by_memory(self, job: Job, needed_bytes: int | None) -> ServingPlan:
        known = self._engine.known
        if known is None or not known.memory_total:
            return ServingPlan(mode="sleep", reason="the memory of the device is not known yet")
        needed = self._needs(job, known.device) if needed_bytes is None else needed_bytes
        free = _left_by_engine(known)
        told = f"training takes about {needed / GB:.1f} GB and the engine leaves {free / GB:.1f} GB"
        if needed > free:
            return ServingPlan(mode="sleep", reason=told)
        return ServingPlan(mode="share", reason=told, memory_fraction=free / known.memory_total)

    def _slept_for(self, job: Job) -> bool:
        told = self._store.events(job.id, types=(EVENT,))
        return bool(told) and told[-1].get("attempt") == job.attempt

    def _seconds_left(self, job: Job) -> Callable[[], float | None]:
        def estimate() -> float | None:
            try:
                return self._store.get(job.id).progress.eta_s
            except NotFoundError:
                return None

        return estimate

    @property
    def _sleepers(self) -> list[str]:
        """Jobs that the engine sleeps for."""
        return [job_id for job_id, plan in self._plans.items() if plan.mode == "sleep"]

    @property
    def _serving_device(self) -> str:
        """As the engine resolved it, once it has."""
        return self._settings.device if self._engine.known is None else self._engine.known.device


def needs_by_estimate(registry: Registry) -> Needs:
    def needs(job: Job, device: str) -> int:
        shape = load_config(registry.base_folder(job.model))
        length = min(job.options.max_seq_len, shape.max_position_embeddings)
        precision: Precision = "fp32" if job.options.dtype == "fp32" else "bf16"
        return estimate_memory(shape, job.options, precision=precision, length=length, device=device).total

    return needs


def _left_by_engine(known: EngineReady) -> int:
    return max(0, int(USABLE_SHARE * known.memory_total) - known.memory_needed)


def _why(job: Job) -> str:
    return f"the engine sleeps while the job {job.id} trains on its device"


def _trainer_threads() -> int:
    """Three quarters of the cores, of which at least one is left to serving where there are two."""
    cores = len(os.sched_getaffinity(0))
    return max(1, min(cores - 1, ceil(0.75 * cores)))

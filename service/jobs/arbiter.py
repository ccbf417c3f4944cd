"""Who has a device while a job trains: the trainer, the engine, or both. The only one who decides that.

Policy first (`plan`), then what follows from it: `make_room` before a trainer starts, `limits` for what it is started
with, `give_back` when it has ended, however it did.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import ceil
from typing import Literal

from service.engine_client import EngineClient
from service.jobs.job import Job
from service.jobs.policy import may_collide
from service.settings import Settings

Mode = Literal["apart", "share", "sleep"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerLimits:
    """What a trainer may take of its machine. None is all of it."""

    num_threads: int | None = None
    memory_fraction: float | None = None
    """Of the device's memory."""
    nice: bool = False
    """Whether others on the CPU go first."""


class DeviceArbiter:
    def __init__(self, engine: EngineClient, settings: Settings) -> None:
        self._engine = engine
        self._settings = settings

    async def make_room(self, job: Job) -> None:
        """Await this before the trainer of `job` starts: afterwards the device has room for it.

        `give_back` must follow, also where this was cancelled or the trainer was never started.
        """

    async def give_back(self, job: Job) -> None:
        """The trainer of `job` has ended, or will not start. Returns at once; doing it twice does nothing."""

    def limits(self, job: Job) -> TrainerLimits:
        """What the trainer of `job` is started with, once there is room."""
        if not may_collide(job.options.device, self._serving_device):
            return TrainerLimits()
        if self._serving_device == "cpu":
            return TrainerLimits(num_threads=self._settings.training_num_threads or _trainer_threads(), nice=True)
        return TrainerLimits()

    @property
    def _serving_device(self) -> str:
        ready = self._engine.ready
        return self._settings.device if ready is None else ready.device


def _trainer_threads() -> int:
    """Three quarters of the cores, of which at least one is left to serving where there are two."""
    cores = len(os.sched_getaffinity(0))
    return max(1, min(cores - 1, ceil(0.75 * cores)))

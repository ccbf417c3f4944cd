"""From a job to a trainer that runs it: its folder, its configuration, and the process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from service.jobs.arbiter import TrainerLimits
from service.jobs.disk import check_disk_space
from service.jobs.job import Job
from service.jobs.policy import run_config
from service.jobs.trainer_process import TRAINER, TrainerProcess
from service.registry import Entry, Registry
from service.settings import Settings
from trainer.run_folder import RunFolder


class Launcher:
    def __init__(self, registry: Registry, settings: Settings, *, command: Sequence[str] = TRAINER) -> None:
        self._registry = registry
        self._settings = settings
        self._command = command

    def run_folder(self, job: Job) -> RunFolder:
        """It may not exist yet."""
        return RunFolder(self._settings.runs_dir / job.run_name)

    def launch(self, job: Job, limits: TrainerLimits) -> TrainerProcess:
        """Start the job's trainer; one after its first goes on with what the earlier ones left.

        Raises UserError for what cannot be trained (any more), NoDiskSpaceError, OSError.
        """
        base = self._registry.base_folder(job.model)
        start = self._start_of(job)
        config = run_config(job, base=base, home=self._settings.home, start=start)
        config = config.model_copy(
            update={"num_threads": limits.num_threads, "memory_fraction": limits.memory_fraction}
        )
        run = self.run_folder(job)
        run.path.mkdir(parents=True, exist_ok=True)
        check_disk_space(
            run.path,
            job.options,
            base=Path(config.model),
            data_bytes=sum(map(_size, self._local_files(job))),
            merge_start=config.merge_start,
        )
        text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        run.config.write_text(text, "utf-8")
        run.result.unlink(missing_ok=True)
        return TrainerProcess.start(run, nice=limits.nice, resume=job.attempt > 1, command=self._command)

    def _start_of(self, job: Job) -> Entry | None:
        return None if job.start_from is None else self._registry.get(job.start_from)

    def _local_files(self, job: Job) -> list[Path]:
        return [self._settings.home / file for dataset in job.local_sets for file in dataset.data_files or ()]


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0

"""What may be removed from the disk, and how: checkpoints that a job has no use for any more, and whole jobs.

Nobody else deletes. Pinned is what answers, what answered before (a rollback may want it), what is the best or the
newest of its job, what an unfinished job began from, and what an adapter stands on.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from pathlib import Path

from service.errors import ApiError, conflict
from service.exports import exported
from service.jobs.job import Job, new_id
from service.jobs.store import JobStore
from service.registry import Entry, Registry
from service.serving import Serving
from trainer.run_folder import RunFolder

logger = logging.getLogger(__name__)

DELETED = ".deleted-"


class Retention:
    def __init__(self, store: JobStore, registry: Registry, serving: Serving, runs_dir: Path) -> None:
        self._store = store
        self._registry = registry
        self._serving = serving
        self._runs_dir = runs_dir

    # ---- checkpoints

    async def keep_newest(self, job: Job) -> None:
        """Remove the checkpoints that `keep_last_n_checkpoints` of the job does not keep, if they are not pinned."""
        number = job.options.keep_last_n_checkpoints
        entries = sorted(self._registry.of_job(job.id), key=lambda entry: entry.step or 0)
        for entry in entries[:-number] if number else ():
            if not self._is_pinned(entry):
                try:
                    await self._remove(entry)
                except ApiError:  # somebody activated it meanwhile
                    continue
                event = {"type": "checkpoint_removed", "model": entry.id, "step": entry.step}
                self._store.record(job.id, [event])

    async def remove_checkpoint(self, entry_id: str) -> Entry:
        """Delete a fine-tuned model with its files. Raises NotFoundError, and ApiError 409 for one that is needed."""
        entry = self._registry.get(entry_id)
        if entry.kind == "base":
            raise conflict(f"{entry.id} is a base model, which is not deleted over HTTP", param="model")
        reason = self._need_for(entry)
        if reason is None and entry.job_id is not None and not self._store.get(entry.job_id).finished:
            reason = f"its job {entry.job_id} is not over"
        if reason is not None:
            raise conflict(f"{entry.id} cannot be deleted: {reason}", param="model")
        await self._remove(entry)
        return entry

    def _is_pinned(self, entry: Entry) -> bool:
        in_use = entry.best or self._registry.was_promoted(entry.id) or entry.id in self._serving.loaded
        return in_use or self._need_for(entry) is not None

    def _need_for(self, entry: Entry) -> str | None:
        """Who needs it, in words; None: nobody."""
        served = self._serving.served
        if served is not None and served.id == entry.id:
            return "it is served; activate another one first"
        for job in self._store.with_status("validating_files", "queued", "running"):
            if job.start_from == entry.id:
                return f"the job {job.id} begins from it"
        above = [other.id for other in self._registry.standing_on(entry) if other.job_id != entry.job_id]
        return f"the adapter {above[0]} stands on it" if above else None

    async def _remove(self, entry: Entry) -> None:
        """From the registry first: what can be named is there."""
        folder = entry.adapter_dir or entry.base_dir
        await self._serving.drop(entry)
        await asyncio.to_thread(_remove_files, folder)
        logger.info("%s was removed", entry.id)

    # ---- jobs

    async def remove_job(self, job: Job) -> None:
        """Delete a job with its checkpoints and its folder. Raises ApiError 409 where it runs or something is needed."""
        _refuse_at_work(job)
        entries = self._registry.of_job(job.id)
        for entry in entries:
            if (reason := self._need_for(entry)) is not None:
                raise conflict(f"the job {job.id} cannot be deleted: {entry.id}: {reason}", param="id")
        for entry in reversed(entries):
            await self._serving.drop(entry)
        _refuse_at_work(self._store.get(job.id))  # somebody may have resumed it meanwhile
        removed = self._delete(job)
        for folder in removed:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
        logger.info("job %s was deleted", job.id)

    def _delete(self, job: Job) -> list[Path]:
        """Also renames its folders, to what is returned: all of it, or none."""
        folders = [self._runs_dir / job.id, *self._runs_dir.glob(f"{job.id}.attempt*")]
        moved: list[tuple[Path, Path]] = []
        try:
            with self._store.database.transaction():
                self._store.delete(job.id)
                for folder in filter(Path.is_dir, folders):
                    away = folder.with_name(f"{DELETED}{folder.name}")
                    folder.rename(away)
                    moved.append((folder, away))
        except BaseException:
            for folder, away in moved:
                away.rename(folder)
            raise
        return [away for _, away in moved]

    def finish_deletions(self) -> None:
        """What a crash interrupted: the folder of a job that is still known comes back, the rest goes."""
        for away in self._runs_dir.glob(f"{DELETED}*"):
            name = away.name.removeprefix(DELETED)
            known = self._store.database.row("SELECT 1 FROM jobs WHERE id = ?", name.split(".")[0])
            if known is None:
                shutil.rmtree(away, ignore_errors=True)
            else:
                away.rename(away.with_name(name))


def _refuse_at_work(job: Job) -> None:
    if job.status in ("running", "validating_files"):
        raise conflict(f"the job {job.id} cannot be deleted while it is {job.status}; cancel it first", param="id")


def _remove_files(folder: Path) -> None:
    """A checkpoint with what was made of it: the merged model of an adapter, and exports."""
    for path in exported(folder):
        path.unlink(missing_ok=True)
    run = RunFolder(folder.parent.parent)
    for parent in (run.checkpoints, run.adapters):
        _remove_folder(parent / folder.name)


def _remove_folder(folder: Path) -> None:
    """Away at once, also from the eyes of those who list the folder; what a crash leaves is swept as unfinished."""
    try:
        away = folder.rename(folder.with_name(f".{folder.name}.{new_id('')[:6]}.tmp"))
    except FileNotFoundError:
        return
    shutil.rmtree(away, ignore_errors=True)

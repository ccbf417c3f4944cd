"""Jobs and their events in SQLite. Decides nothing: the supervisor does.

A change of a job and the events that tell it are one transaction, and so are the trainer's events and the offset up
to which they were read: after a crash nothing is told twice and nothing is lost.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any
from weakref import WeakValueDictionary

from lm.errors import NotFoundError
from service.database import Database
from service.jobs.job import Job, JobError, Progress, Promote, Status, new_id
from trainer.config import TrainingOptions

JobEvent = dict[str, Any]
"""{"id": number within the job from 1, "type", "time" (unix), and what the type brings}."""


class JobStore:
    def __init__(self, database: Database) -> None:
        self.database = database
        self._changed: WeakValueDictionary[str, asyncio.Event] = WeakValueDictionary()
        self.is_closing = False
        """Set by `release_followers`."""

    def create(
        self,
        *,
        status: Status,
        model: str,
        options: TrainingOptions,
        data_files: Iterable[str],
        suffix: str,
        promote: Promote,
        file_id: str | None = None,
        job_id: str | None = None,
        notes: Iterable[str] = (),
    ) -> Job:
        """Insert a job with its first event, which is named like its status."""
        job_id = job_id or new_id("ftjob-")
        with self.database.transaction():
            self.database.insert(
                "jobs",
                id=job_id,
                status=status,
                model=model,
                options=options.model_dump_json(),
                data_files=json.dumps(list(data_files)),
                file_id=file_id,
                suffix=suffix,
                promote=promote,
                notes=json.dumps(list(notes)),
                created_at=time.time(),
            )
            self.record(job_id, [{"type": status}])
        return self.get(job_id)

    def get(self, job_id: str) -> Job:
        """Raises NotFoundError."""
        row = self.database.row("SELECT * FROM jobs WHERE id = ?", job_id)
        if row is None:
            raise NotFoundError(f"there is no job {job_id!r:.80}; GET /finetune lists the jobs", param="id")
        return _job(row)

    def with_status(self, *statuses: Status) -> list[Job]:
        """Oldest first: the order in which jobs are started."""
        places = ", ".join("?" * len(statuses))
        return [
            _job(row)
            for row in self.database.rows(f"SELECT * FROM jobs WHERE status IN ({places}) ORDER BY seq", *statuses)
        ]

    def page(self, *, limit: int, after: str | None = None) -> tuple[list[Job], bool]:
        """Newest first, from the job after `after` on, and whether there are more. Raises NotFoundError."""
        where, parameters = "", []
        if after is not None:
            self.get(after)
            where, parameters = "WHERE seq < (SELECT seq FROM jobs WHERE id = ?)", [after]
        rows = self.database.rows(f"SELECT * FROM jobs {where} ORDER BY seq DESC LIMIT ?", *parameters, limit + 1)
        return [_job(row) for row in rows[:limit]], len(rows) > limit

    def counts(self) -> dict[str, int]:
        return {row[0]: row[1] for row in self.database.rows("SELECT status, count(*) FROM jobs GROUP BY status")}

    def uses_file(self, file_id: str) -> str | None:
        """The unfinished job that needs this uploaded file, if any."""
        row = self.database.row(
            "SELECT id FROM jobs WHERE file_id = ? AND status IN ('validating_files', 'queued', 'running')", file_id
        )
        return None if row is None else str(row["id"])

    def record(self, job_id: str, events: Iterable[Mapping[str, Any]] = (), **columns: Any) -> None:
        """Append events and set columns of the job, in one transaction, and wake those who follow the job.

        Events without a time get the present one. Column values are those of `Job`; dataclasses become JSON.
        """
        with self.database.transaction():
            self._append(job_id, events)
            if columns:
                values = {name: _column(value) for name, value in columns.items()}
                assignments = ", ".join(f"{name} = :{name}" for name in values)
                self.database.connection.execute(
                    f"UPDATE jobs SET {assignments} WHERE id = :job_id", {**values, "job_id": job_id}
                )
        changed = self._changed.pop(job_id, None)
        if changed is not None:
            changed.set()

    def _append(self, job_id: str, events: Iterable[Mapping[str, Any]]) -> None:
        newest = self.database.row("SELECT max(seq) AS seq FROM job_events WHERE job_id = ?", job_id)
        assert newest is not None  # an aggregate always has a row
        for seq, event in enumerate(events, start=(newest["seq"] or 0) + 1):
            data = {key: value for key, value in event.items() if key not in ("type", "time")}
            self.database.insert(
                "job_events",
                job_id=job_id,
                seq=seq,
                type=event["type"],
                time=event.get("time", time.time()),
                data=json.dumps(data),
            )

    def events(self, job_id: str, *, after: int = 0, limit: int = -1, types: tuple[str, ...] = ()) -> list[JobEvent]:
        """In order, those with an id above `after`; of some types only, if given."""
        only = f"AND type IN ({', '.join('?' * len(types))})" if types else ""
        rows = self.database.rows(
            f"SELECT * FROM job_events WHERE job_id = ? AND seq > ? {only} ORDER BY seq LIMIT ?",
            job_id,
            after,
            *types,
            limit,
        )
        return [{"id": row["seq"], "type": row["type"], "time": row["time"], **json.loads(row["data"])} for row in rows]

    def changed(self, job_id: str) -> asyncio.Event:
        """An event that is set at the next change of the job. Take it before reading what it shall follow."""
        return self._changed.setdefault(job_id, asyncio.Event())

    def release_followers(self) -> None:
        """Wake everybody who follows a job, for good: the service ends."""
        self.is_closing = True
        for changed in list(self._changed.values()):
            changed.set()


def _column(value: Any) -> Any:
    return json.dumps(asdict(value)) if isinstance(value, JobError | Progress) else value


def _job(row: sqlite3.Row) -> Job:
    columns = dict(row)
    del columns["seq"]
    error = json.loads(columns.pop("error") or "null")
    return Job(
        **{
            **columns,
            "options": TrainingOptions.model_validate_json(columns["options"]),
            "data_files": tuple(json.loads(columns["data_files"])),
            "notes": tuple(json.loads(columns["notes"])),
            "cancel_requested": bool(columns["cancel_requested"]),
            "progress": Progress(**json.loads(columns["progress"])),
            "error": error and JobError(**error),
        }
    )

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
from typing import Any
from weakref import WeakValueDictionary

from lm.errors import NotFoundError
from service.database import Database
from service.jobs.columns import column, job_of
from service.jobs.job import Job, Promote, Status, new_id
from trainer.config import TrainingOptions

JobEvent = dict[str, Any]
"""{"id": number within the job from 1, "type", "time" (unix), and what the type brings}."""


class KeyTakenError(Exception):
    """Another job was created with this idempotency key."""


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
        job_id: str | None = None,
        file_id: str | None = None,
        notes: Iterable[str] = (),
        **more: Any,
    ) -> Job:
        """Insert a job with its first event, which is named like its status.

        `more` are further fields of `Job` that have a default there, such as `datasets`, `priority`, `metadata`,
        `webhook`. Raises KeyTakenError when another job has the idempotency key.
        """
        job_id = job_id or new_id("ftjob-")
        columns = {
            "status": status,
            "model": model,
            "options": options,
            "data_files": tuple(data_files),
            "suffix": suffix,
            "promote": promote,
            "file_id": file_id,
            "file_ids": () if file_id is None else (file_id,),
            "notes": tuple(notes),
            **more,
        }
        with self.database.transaction():
            if (key := more.get("idempotency_key")) is not None and self.with_key(key) is not None:
                raise KeyTakenError(key)
            values = {name: column(value) for name, value in columns.items()}
            self.database.insert("jobs", id=job_id, run_name=job_id, created_at=time.time(), **values)
            self.record(job_id, [{"type": status}])
        return self.get(job_id)

    def with_key(self, idempotency_key: str) -> Job | None:
        """The job that was created with this key."""
        row = self.database.row("SELECT * FROM jobs WHERE idempotency_key = ?", idempotency_key)
        return None if row is None else job_of(row)

    def get(self, job_id: str) -> Job:
        """Raises NotFoundError."""
        row = self.database.row("SELECT * FROM jobs WHERE id = ?", job_id)
        if row is None:
            raise NotFoundError(f"there is no job {job_id!r:.80}; GET /finetune lists the jobs", param="id")
        return job_of(row)

    def with_status(self, *statuses: Status) -> list[Job]:
        """Oldest first."""
        places = ", ".join("?" * len(statuses))
        rows = self.database.rows(f"SELECT * FROM jobs WHERE status IN ({places}) ORDER BY seq", *statuses)
        return [job_of(row) for row in rows]

    def queue(self) -> list[Job]:
        """The jobs that wait for their device, in the order in which they are started; paused ones do not wait."""
        query = "SELECT * FROM jobs WHERE status = 'queued' AND NOT paused ORDER BY priority DESC, seq"
        return [job_of(row) for row in self.database.rows(query)]

    def page(
        self, *, limit: int, after: str | None = None, metadata: Mapping[str, str] | None = None
    ) -> tuple[list[Job], bool]:
        """Newest first, from the job after `after` on, and whether there are more. Raises NotFoundError.

        Only those that have all of `metadata`, if given; with an empty one, those that have none.
        """
        conditions, parameters = ["1"], []
        if after is not None:
            self.get(after)
            conditions.append("seq < (SELECT seq FROM jobs WHERE id = ?)")
            parameters.append(after)
        if metadata is not None and not metadata:
            conditions.append("metadata = '{}'")
        for key, value in (metadata or {}).items():
            conditions.append(
                "EXISTS (SELECT 1 FROM json_each(metadata) AS pair WHERE pair.key = ? AND pair.value = ?)"
            )
            parameters += [key, value]
        query = f"SELECT * FROM jobs WHERE {' AND '.join(conditions)} ORDER BY seq DESC LIMIT ?"
        rows = self.database.rows(query, *parameters, limit + 1)
        return [job_of(row) for row in rows[:limit]], len(rows) > limit

    def counts(self) -> dict[str, int]:
        return {row[0]: row[1] for row in self.database.rows("SELECT status, count(*) FROM jobs GROUP BY status")}

    def uses_file(self, file_id: str) -> str | None:
        """The unfinished job that needs this uploaded file, if any."""
        row = self.database.row(
            "SELECT jobs.id FROM jobs, json_each(file_ids) AS file"
            " WHERE file.value = ? AND status IN ('validating_files', 'queued', 'running')",
            file_id,
        )
        return None if row is None else str(row["id"])

    def delete(self, job_id: str) -> None:
        """Remove the job with its events and webhooks. The registry's entries of it must be gone."""
        with self.database.transaction():
            for table, key in (("job_events", "job_id"), ("webhooks", "job_id"), ("jobs", "id")):
                self.database.connection.execute(f"DELETE FROM {table} WHERE {key} = ?", (job_id,))
        self._wake(job_id)

    def record(self, job_id: str, events: Iterable[Mapping[str, Any]] = (), **columns: Any) -> None:
        """Append events and set columns of the job, in one transaction, and wake those who follow the job.

        Events without a time get the present one. Column values are those of `Job`.
        """
        with self.database.transaction():
            self._append(job_id, events)
            if columns:
                values = {name: column(value) for name, value in columns.items()}
                assignments = ", ".join(f"{name} = :{name}" for name in values)
                self.database.connection.execute(
                    f"UPDATE jobs SET {assignments} WHERE id = :job_id", {**values, "job_id": job_id}
                )
        self._wake(job_id)

    def _wake(self, job_id: str) -> None:
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
        return [_event(row) for row in rows]

    def newest_events(self, job_id: str, *, before: int | None = None, limit: int) -> list[JobEvent]:
        """Newest first, those with an id below `before`."""
        rows = self.database.rows(
            "SELECT * FROM job_events WHERE job_id = ? AND seq < ? ORDER BY seq DESC LIMIT ?",
            job_id,
            2**62 if before is None else before,
            limit,
        )
        return [_event(row) for row in rows]

    def changed(self, job_id: str) -> asyncio.Event:
        """An event that is set at the next change of the job. Take it before reading what it shall follow."""
        return self._changed.setdefault(job_id, asyncio.Event())

    def release_followers(self) -> None:
        """Wake everybody who follows a job, for good: the service ends."""
        self.is_closing = True
        for changed in list(self._changed.values()):
            changed.set()


def _event(row: sqlite3.Row) -> JobEvent:
    return {"id": row["seq"], "type": row["type"], "time": row["time"], **json.loads(row["data"])}

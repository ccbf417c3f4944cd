"""The stream of a job's events: live, resumable, and ended by the job or by the client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from service.jobs.job import Job
from service.jobs.store import JobStore
from service.routes import finetune_figures
from service.routes.finetune_figures import follow
from service.sse import EventStream
from trainer.config import TrainingOptions


@pytest.fixture
def job(store: JobStore) -> Job:
    return store.create(
        status="running", model="tiny", options=TrainingOptions(), data_files=[], suffix="", promote="final"
    )


async def next_of(events: AsyncGenerator[bytes]) -> str:
    async with asyncio.timeout(5):
        return (await anext(events)).decode()


def test_events_are_sent_as_they_come_until_the_last_one(store: JobStore, job: Job) -> None:
    async def work() -> None:
        events = follow(store, job.id, after=0)
        assert (await next_of(events)).startswith("id: 1\nevent: running\ndata: {")
        asyncio.get_running_loop().call_later(0.05, store.record, job.id, [{"type": "step", "time": 1.5, "loss": 2.0}])
        step = await next_of(events)
        assert step == 'id: 2\nevent: step\ndata: {"id":2,"type":"step","time":1.5,"loss":2.0}\n\n'
        store.record(job.id, [{"type": "succeeded"}], status="succeeded")
        assert (await next_of(events)).startswith("id: 3\nevent: succeeded\n")
        with pytest.raises(StopAsyncIteration):
            await next_of(events)

    asyncio.run(work())


def test_a_stream_begins_behind_the_event_it_names(store: JobStore, job: Job) -> None:
    async def work() -> None:
        store.record(job.id, [{"type": "step"}, {"type": "failed"}], status="failed")
        assert [item.split(b"\n")[0] async for item in follow(store, job.id, after=1)] == [b"id: 2", b"id: 3"]
        assert [item async for item in follow(store, job.id, after=3)] == []
        assert not store._changed  # nothing is kept for followers that have gone

    asyncio.run(work())


def test_a_silent_job_is_kept_alive_by_comments(store: JobStore, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune_figures, "HEARTBEAT_S", 0.01)

    async def work() -> None:
        events = follow(store, job.id, after=1)
        assert [await next_of(events) for _ in range(2)] == [": still here\n\n"] * 2
        await events.aclose()

    asyncio.run(work())


def test_the_end_of_the_service_ends_a_stream_after_what_happened_until_then(store: JobStore, job: Job) -> None:
    async def work() -> None:
        events = follow(store, job.id, after=1)
        store.record(job.id, [{"type": "step"}])
        asyncio.get_running_loop().call_later(0.05, store.release_followers)
        assert (await next_of(events)).startswith("id: 2\nevent: step\n")
        with pytest.raises(StopAsyncIteration):
            await next_of(events)

    asyncio.run(work())


def test_a_client_that_leaves_ends_its_stream(store: JobStore, job: Job) -> None:
    async def work() -> None:
        left = asyncio.Event()
        sent: list[Any] = []

        async def receive() -> Any:
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)
            if b"event: running" in message.get("body", b""):
                left.set()

        events = follow(store, job.id, after=0)
        async with asyncio.timeout(5):
            await EventStream(b": begin\n\n", events)({"type": "http"}, receive, send)
        assert len(sent) == 3
        with pytest.raises(StopAsyncIteration):  # it is closed, and does not wait for more
            await next_of(events)

    asyncio.run(work())

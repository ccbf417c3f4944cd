"""A database that cannot be written for a while, as on a full disk: here, since another process locks it."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from service.jobs import retry
from service.jobs.job import Job
from tests.support.jobs import SHORT, Bench, make_bench, running_bench
from tests.support.processes import is_alive
from tests.support.tiny import make_tiny_llama


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_tiny_llama(tmp_path / "models" / "tiny")
    monkeypatch.setattr(retry, "RETRY_S", 0.2)
    return tmp_path


@contextmanager
def nothing_can_be_written(bench: Bench) -> Iterator[None]:
    bench.database.connection.execute("PRAGMA busy_timeout = 0")
    connection = sqlite3.connect(bench.settings.database, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        connection.close()


def test_a_job_that_ends_meanwhile_is_written_down_later_and_the_next_one_starts(home: Path) -> None:
    async def work() -> None:
        async with running_bench(home) as bench:
            first = await bench.training(bench.supervisor.submit(**bench.columns(SHORT | {"epochs": 50})))
            second = bench.supervisor.submit(**bench.columns(SHORT, promote="manual"))
            assert first.pid is not None
            with nothing_can_be_written(bench):
                with pytest.raises(sqlite3.OperationalError):
                    bench.supervisor.cancel(second.id)
                async with asyncio.timeout(60):
                    while is_alive(first.pid):
                        await asyncio.sleep(0.05)
                await asyncio.sleep(3 * retry.RETRY_S)
                assert bench.store.get(first.id).status == "running"
            first, second = await bench.finished(first), await bench.finished(second)
            assert (first.status, second.status) == ("succeeded", "succeeded")
            steps = bench.store.events(first.id, types=("step",))
            assert [step["step"] for step in steps] == [*range(1, steps[0]["total_steps"] + 1)]
            assert bench.types(first)[-2:] == ["promoted", "succeeded"]
            assert bench.types(first).count("succeeded") == 1

    asyncio.run(work())


def test_a_job_that_cannot_be_started_now_is_started_later(home: Path) -> None:
    async def work() -> None:
        bench = make_bench(home)
        job = bench.store.create(**bench.columns(SHORT, promote="manual"))
        with nothing_can_be_written(bench):
            await bench.supervisor.start()
            assert bench.store.get(job.id).status == "queued"
        assert (await bench.finished(job)).status == "succeeded"
        await bench.supervisor.stop()
        bench.database.close()

    asyncio.run(work())


def test_a_failure_that_cannot_be_written_down_now_is_later(home: Path) -> None:
    async def work() -> None:
        bench = make_bench(home, command=("/nowhere",))
        job = bench.store.create(**bench.columns(SHORT))
        await bench.supervisor.start()  # the job is running now, and its failure is next
        with nothing_can_be_written(bench):
            await asyncio.sleep(2 * retry.RETRY_S)
            assert bench.store.get(job.id).status == "running"
        failed = await bench.finished(job)
        assert failed.error is not None
        assert (failed.status, failed.error.code) == ("failed", "internal_error")
        await bench.supervisor.stop()
        bench.database.close()

    asyncio.run(work())


def test_a_job_whose_device_sleeps_for_it_later_than_it_should_is_started_all_the_same(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        async with running_bench(home) as bench:

            async def make_room(job: Job) -> None:  # as the arbiter does where the engine is to sleep
                bench.store.record(job.id, [{"type": "serving_sleeps"}])

            monkeypatch.setattr(bench.arbiter, "make_room", make_room)
            job = bench.supervisor.submit(**bench.columns(SHORT, promote="manual"))
            with nothing_can_be_written(bench):
                await asyncio.sleep(2 * retry.RETRY_S)
            assert (await bench.finished(job)).status == "succeeded"

    asyncio.run(work())

"""Jobs that stop and go on, with real trainers on a tiny model; the engine is a stand-in."""

from __future__ import annotations

import asyncio
import csv
import os
import signal
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from service.errors import ApiError
from service.jobs.job import Job
from tests.support.jobs import SHORT, Bench, make_bench, running_bench

STEADY = SHORT | {"epochs": 20, "save_every_n_steps": 10}
"""40 steps, more than fit between two looks at them."""


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


async def paused(bench: Bench, job: Job) -> Job:
    return await bench.until(job, lambda now: now.paused)


def steps(bench: Bench, job: Job) -> list[int]:
    return [event["step"] for event in bench.store.events(job.id, types=("step",))]


def csv_steps(bench: Bench, job: Job) -> list[int]:
    with bench.supervisor.run_folder(job).metrics.open() as file:
        return [int(row["step"]) for row in csv.DictReader(file)]


def test_a_paused_job_leaves_its_device_and_goes_on_in_its_folder(tiny_home: Path) -> None:
    async def work() -> None:
        async with running_bench(tiny_home) as bench:
            job = await bench.training(bench.supervisor.submit(**bench.columns(STEADY)))
            bench.supervisor.pause(job.id)
            job = bench.supervisor.resume(job.id)  # while the state is saved: it goes on at once
            assert (job.status, job.pause_requested) == ("running", False)
            job = await bench.until(job, lambda now: now.attempt == 2 and now.pid is not None)
            other = bench.supervisor.submit(**bench.columns(SHORT))
            await bench.until(job, lambda now: bench.store.events(now.id, types=("resumed",)))
            assert bench.supervisor.pause(job.id).pause_requested
            assert bench.supervisor.pause(job.id).status == "running"  # again is fine
            job = await paused(bench, job)
            assert (job.status, job.pid, job.error) == ("queued", None, None)
            assert 1 <= len(steps(bench, job)) < 40
            assert (await bench.finished(other)).status == "succeeded"
            bench.supervisor.resume(job.id)
            job = await bench.finished(job)
            assert (job.status, job.attempt, job.restarts) == ("succeeded", 3, 0)
            assert steps(bench, job) == csv_steps(bench, job) == list(range(1, 41))
            states = ("queued", "running", "pausing", "paused", "succeeded")
            assert [name for name in bench.types(job) if name in states] == [
                *("queued", "running", "pausing", "running", "queued", "running"),
                *("pausing", "paused", "queued", "running", "succeeded"),
            ]
            assert [entry.step for entry in bench.registry.of_job(job.id)] == [10, 20, 30, 40]
            assert [name for name, id in bench.arbiter.asked if id == job.id] == ["make_room", "give_back"] * 3
            assert {path.name for path in (tiny_home / "runs").iterdir()} == {job.id, other.id}

    run(work())


def test_a_waiting_job_can_be_paused_and_is_overtaken(tiny_home: Path) -> None:
    async def work() -> None:
        async with running_bench(tiny_home) as bench:
            bench.arbiter.room.clear()  # no trainer is started
            first = bench.supervisor.submit(**bench.columns(SHORT))
            second = bench.supervisor.submit(**bench.columns(SHORT))
            third = bench.supervisor.submit(**bench.columns(SHORT, priority=5))
            assert [job.id for job in bench.store.queue()] == [third.id, second.id]
            assert bench.supervisor.pause(second.id).paused
            assert [job.id for job in bench.store.queue()] == [third.id]
            bench.supervisor.cancel(first.id)
            await bench.until(third, lambda now: now.status == "running")
            bench.supervisor.cancel(third.id)
            await bench.finished(third)
            assert bench.store.get(second.id).status == "queued"
            assert bench.supervisor.resume(second.id).status == "running"
            assert bench.supervisor.resume(second.id).status == "running"  # again is fine
            bench.supervisor.cancel(second.id)

    run(work())


def test_a_paused_job_can_be_cancelled_and_outlives_a_restart(tiny_home: Path) -> None:
    async def work() -> None:
        async with running_bench(tiny_home) as bench:
            kept = bench.supervisor.submit(**bench.columns(SHORT, paused=True))
            gone = bench.supervisor.submit(**bench.columns(SHORT, paused=True))
            job = bench.supervisor.cancel(gone.id)
            assert (job.status, job.paused) == ("cancelled", False)
            for verb in (bench.supervisor.resume, bench.supervisor.pause):
                with pytest.raises(ApiError) as error:
                    verb(gone.id)
                assert error.value.status_code == 409
        async with running_bench(tiny_home) as bench:
            assert bench.store.get(kept.id).paused

    run(work())


def test_a_job_that_is_cancelled_while_it_is_paused_keeps_nothing_to_go_on_with(tiny_home: Path) -> None:
    async def work() -> None:
        async with running_bench(tiny_home) as bench:
            job = bench.supervisor.submit(**bench.columns(SHORT, paused=True))
            state = bench.supervisor.run_folder(job).state
            (state / "step_1").mkdir(parents=True)
            bench.supervisor.cancel(job.id)
            async with asyncio.timeout(5):
                while state.exists():
                    await asyncio.sleep(0.01)
            assert bench.store.get(job.id).status == "cancelled"

    run(work())


def test_a_stop_of_the_service_pauses_what_trains_and_a_start_goes_on_with_it(tiny_home: Path) -> None:
    async def work() -> None:
        async with running_bench(tiny_home, max_job_restarts=0) as bench:
            job = await bench.training(bench.supervisor.submit(**bench.columns(STEADY)))
        bench = make_bench(tiny_home)
        stopped = bench.store.get(job.id)
        bench.database.close()
        assert (stopped.status, stopped.paused) == ("queued", False)
        async with running_bench(tiny_home, max_job_restarts=0) as bench:
            job = await bench.finished(job)
            assert (job.status, job.attempt, job.restarts) == ("succeeded", 2, 0)
            assert steps(bench, job) == list(range(1, 41))

    run(work())


def test_a_failed_job_goes_on_where_its_trainer_died(tiny_home: Path) -> None:
    async def work() -> None:
        async with running_bench(tiny_home) as bench:
            job = bench.supervisor.submit(**bench.columns(STEADY))
            job = await bench.until(job, lambda now: any(step > 10 for step in steps(bench, now)))
            assert job.pid is not None
            os.kill(job.pid, signal.SIGKILL)
            job = await bench.finished(job)
            assert job.error is not None
            assert job.error.code == "trainer_died"
            assert bench.supervisor.resume(job.id).error is None
            job = await bench.finished(job)
            assert (job.status, job.attempt) == ("succeeded", 2)
            resumed = bench.store.events(job.id, types=("resumed",))
            assert [event["step"] >= 10 for event in resumed] == [True]
            assert csv_steps(bench, job) == list(range(1, 41))

    run(work())


def test_a_job_that_failed_while_it_was_cancelled_is_not_cancelled_again_when_it_goes_on(tiny_home: Path) -> None:
    async def work() -> None:
        async with running_bench(tiny_home) as bench:
            bench.arbiter.room.clear()  # no trainer is started
            job = bench.supervisor.submit(**bench.columns(SHORT, paused=True))
            bench.store.record(job.id, [{"type": "failed"}], status="failed", cancel_requested=True)
            assert not bench.supervisor.resume(job.id).cancel_requested
            bench.supervisor.cancel(job.id)

    run(work())


def test_a_job_whose_data_was_bad_is_checked_again(tiny_home: Path) -> None:
    async def work() -> None:
        async with running_bench(tiny_home) as bench:
            columns = bench.columns(SHORT, status="validating_files", data_files=["data/late.jsonl"])
            job = await bench.finished(bench.supervisor.submit(**columns))
            assert job.error is not None
            assert job.error.code == "invalid_training_file"
            (tiny_home / "data" / "late.jsonl").write_text('{"input": "a", "output": "b"}\n')
            assert bench.supervisor.resume(job.id).status == "validating_files"
            await bench.until(job, lambda now: now.status == "running")

    run(work())


def test_a_job_that_waits_for_room_can_be_cancelled_and_paused(tiny_home: Path) -> None:
    async def work() -> None:
        async with running_bench(tiny_home) as bench:
            bench.arbiter.room.clear()
            job = bench.supervisor.submit(**bench.columns(SHORT))
            assert job.status == "running"
            bench.supervisor.pause(job.id)
            job = await paused(bench, job)
            assert (job.status, job.attempt) == ("queued", 1)
            bench.supervisor.resume(job.id)
            bench.supervisor.cancel(job.id)
            assert (await bench.finished(job)).status == "cancelled"
            waiting = bench.supervisor.submit(**bench.columns(SHORT))
        bench = make_bench(tiny_home)  # and a stop of the service leaves it to the next start
        assert (bench.store.get(waiting.id).status, bench.store.get(waiting.id).restarts) == ("queued", 0)
        bench.database.close()
        assert [name for name, _ in bench.arbiter.asked] == []

    run(work())


def test_a_pause_that_is_taken_back_at_once_does_not_start_a_trainer_without_room(tiny_home: Path) -> None:
    async def work() -> None:
        async with running_bench(tiny_home) as bench:
            bench.arbiter.room.clear()
            job = bench.supervisor.submit(**bench.columns(SHORT))
            await asyncio.sleep(0)  # it waits for room now
            bench.supervisor.pause(job.id)
            bench.supervisor.resume(job.id)
            await asyncio.sleep(0.5)
            assert bench.store.get(job.id).pid is None
            assert [name for name, _ in bench.arbiter.asked] == ["make_room", "give_back", "make_room"]
            bench.arbiter.room.set()
            assert (await bench.finished(job)).status == "succeeded"

    run(work())


def test_a_pause_that_comes_before_the_trainer_listens_loses_nothing(tiny_home: Path) -> None:
    async def work() -> None:
        async with running_bench(tiny_home) as bench:
            job = bench.supervisor.submit(**bench.columns(SHORT))
            job = await bench.until(job, lambda now: now.pid is not None)
            bench.supervisor.pause(job.id)
            job = await paused(bench, job)
            assert bench.types(job)[-1] == "paused"
            bench.supervisor.resume(job.id)
            job = await bench.training(job)
            assert steps(bench, job)[0] == 1

    run(work())

"""Real trainers on a tiny model; the engine is a stand-in. tests/service/test_loop.py has the rest."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from service.errors import ApiError
from service.jobs.checking import SMALL_BYTES
from service.jobs.job import Job
from service.jobs.trainer_process import is_alive
from tests.support import processes
from tests.support.jobs import LONG, SHORT, make_bench, running_bench


@contextmanager
def supervisor_process(home: Path) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-m", "tests.support.jobs", str(home)])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


def test_a_cancelled_job_ends_early_and_promotes_nothing(tiny_home: Path) -> None:
    async def work() -> None:
        async with running_bench(tiny_home) as bench:
            running = await bench.training(bench.supervisor.submit(**bench.columns(LONG, promote="each")))
            waiting = bench.supervisor.submit(**bench.columns(SHORT))
            assert bench.supervisor.cancel(waiting.id).status == "cancelled"
            bench.supervisor.cancel(running.id)
            assert bench.supervisor.cancel(running.id).cancel_requested  # again is fine
            running = await bench.finished(running)
            assert (running.status, running.error) == ("cancelled", None)
            assert bench.types(running)[-1] == "cancelled"
            assert running.progress.step is not None
            assert running.progress.step["step"] < running.progress.step["total_steps"]
            assert running.pid is not None
            assert not processes.is_alive(running.pid)
            assert bench.registry.promotions("tiny") == []
            with pytest.raises(ApiError) as error:
                bench.supervisor.cancel(running.id)
            assert error.value.status_code == 409
            assert error.value.headers == {"x-should-retry": "false"}

    run(work())


def test_a_job_that_cannot_be_started_fails_and_does_not_block_its_device(tiny_home: Path) -> None:
    async def work() -> None:
        async with running_bench(tiny_home, command=("/nowhere",)) as bench:
            job = await bench.finished(bench.supervisor.submit(**bench.columns(SHORT)))
            assert job.error is not None
            assert (job.status, job.error.code) == ("failed", "internal_error")
            assert "No such file or directory" in job.error.message
        async with running_bench(tiny_home, command=("\0",)) as bench:
            job = await bench.finished(bench.supervisor.submit(**bench.columns(SHORT)))
            assert job.error is not None
            assert (job.status, job.error.code) == ("failed", "internal_error")
            assert "log of the service" in job.error.message

    run(work())


def test_what_a_killed_trainer_was_writing_does_not_stay_on_the_disk(tiny_home: Path) -> None:
    async def work() -> None:
        async with running_bench(tiny_home) as bench:
            job = await bench.training(bench.supervisor.submit(**bench.columns(LONG)))
            half = bench.supervisor.run_folder(job).checkpoints / ".step_2.abcd.tmp"
            half.mkdir(parents=True)
            assert job.pid is not None
            os.kill(job.pid, signal.SIGKILL)
            assert (await bench.finished(job)).status == "failed"
            assert not half.exists()

    run(work())


def test_a_run_whose_folder_was_removed_has_not_succeeded(tiny_home: Path) -> None:
    async def work() -> None:
        async with running_bench(tiny_home) as bench:
            job = await bench.training(bench.supervisor.submit(**bench.columns(SHORT | {"epochs": 50})))
            shutil.rmtree(bench.supervisor.run_folder(job).path)
            job = await bench.finished(job)
            assert job.error is not None
            assert job.status == "failed"
            assert bench.registry.promotions("tiny") == []

    run(work())


def test_what_the_trainer_refuses_is_the_reason_of_the_failure(tiny_home: Path) -> None:
    async def work() -> None:
        async with running_bench(tiny_home) as bench:
            job = await bench.finished(bench.supervisor.submit(**bench.columns(SHORT | {"device": "npu:7"})))
            assert job.status == "failed"
            assert job.error is not None
            assert job.error.code == "invalid_config"
            assert "npu" in job.error.message

    run(work())


def test_a_large_file_is_checked_in_the_job_and_its_mistake_is_told_with_line_and_column(tiny_home: Path) -> None:
    async def work() -> None:
        async with running_bench(tiny_home) as bench:
            columns = bench.columns(SHORT, status="validating_files", data_files=["data/large.jsonl"])
            line = '{"input": "a", "output": "b"}\n'
            large = tiny_home / "data" / "large.jsonl"
            large.write_text(line * (SMALL_BYTES // len(line) + 1) + '{"input": }\n')
            job = bench.supervisor.submit(**columns)
            cancelled = bench.supervisor.submit(**columns)
            assert job.status == "validating_files"
            assert bench.supervisor.cancel(cancelled.id).status == "cancelled"
            job = await bench.finished(job)
            assert job.error is not None
            assert job.error.code == "invalid_training_file"
            number = len(large.read_text().splitlines())
            assert f"large.jsonl, record {number} (line {number}, column 11)" in job.error.message
            assert bench.types(job) == ["validating_files", "failed"]
            large.write_text(line * (SMALL_BYTES // len(line) + 1))
            good = bench.supervisor.submit(**columns)
            await bench.until(good, lambda now: now.status == "running")
            assert bench.types(good)[:3] == ["validating_files", "queued", "running"]

    run(work())


async def _orphaned_job(home: Path) -> Job:
    """A job whose trainer is at work and whose service was killed."""
    bench = make_bench(home)
    job = bench.store.create(**bench.columns(LONG))
    bench.database.close()
    with supervisor_process(home) as process:
        await _appears(home / "runs" / job.id / "events.jsonl")
        process.send_signal(signal.SIGKILL)
        process.wait()
    return job


def test_a_run_that_ended_while_the_service_was_away_is_completed_once(tiny_home: Path) -> None:
    async def work() -> None:
        bench = make_bench(tiny_home)
        job = bench.store.create(**bench.columns(SHORT))
        bench.database.close()
        with supervisor_process(tiny_home) as process:
            await _appears(tiny_home / "runs" / job.id / "events.jsonl")
            process.send_signal(signal.SIGKILL)
            process.wait()
            await _appears(tiny_home / "runs" / job.id / "result.json")
        for _ in range(2):
            async with running_bench(tiny_home) as bench:
                done = await bench.finished(job)
                assert done.status == "succeeded"
                assert bench.types(done).count("promoted") == bench.types(done).count("succeeded") == 1
                assert len(bench.registry.promotions("tiny")) == 1

    run(work())


def test_a_trainer_that_died_with_the_service_begins_again_a_bounded_number_of_times(tiny_home: Path) -> None:
    async def work() -> None:
        job = await _orphaned_job(tiny_home)
        bench = make_bench(tiny_home)
        pid = bench.store.get(job.id).pid
        bench.database.close()
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(10):
            while is_alive(bench.supervisor.run_folder(job)):
                await asyncio.sleep(0.05)
        async with running_bench(tiny_home, max_job_restarts=1) as bench:
            again = await bench.training(job)
            assert (again.attempt, again.restarts) == (2, 1)
            assert bench.types(again).count("queued") == 2
            assert again.pid is not None
        bench = make_bench(tiny_home)
        bench.store.record(job.id, status="running", pid=again.pid)  # as if this trainer had died with the service, too
        bench.database.close()
        bench.supervisor.run_folder(job).result.unlink()
        async with running_bench(tiny_home, max_job_restarts=1) as bench:
            given_up = await bench.finished(job)
            assert given_up.status == "failed"
            assert given_up.error is not None
            assert given_up.error.code == "too_many_restarts"

    run(work())


def test_a_service_that_cannot_start_leaves_the_trainer_that_it_found_to_the_next_one(tiny_home: Path) -> None:
    async def work() -> None:
        job = await _orphaned_job(tiny_home)
        bench = make_bench(tiny_home)
        await bench.supervisor.start()
        await bench.supervisor.stop(spare_adopted=True)
        bench.database.close()
        async with running_bench(tiny_home) as bench:
            job = bench.store.get(job.id)
            assert (job.status, job.attempt) == ("running", 1)
            bench.supervisor.cancel(job.id)
            assert (await bench.finished(job)).status == "cancelled"

    run(work())


def test_a_job_that_cannot_be_taken_up_fails_alone(tiny_home: Path) -> None:
    async def work() -> None:
        bench = make_bench(tiny_home)
        damaged = bench.store.create(**bench.columns(SHORT))
        bench.store.record(damaged.id, status="running")
        run = bench.supervisor.run_folder(damaged)
        run.path.mkdir(parents=True)
        run.result.write_text('{"status": "succ')
        next_ = bench.store.create(**bench.columns(SHORT))
        bench.database.close()
        async with running_bench(tiny_home) as bench:
            damaged, next_ = await bench.finished(damaged), await bench.finished(next_)
            assert damaged.error is not None
            assert (damaged.status, damaged.error.code) == ("failed", "internal_error")
            assert next_.status == "succeeded"

    run(work())


async def _appears(path: Path) -> None:
    async with asyncio.timeout(120):
        while not path.exists():
            await asyncio.sleep(0.05)

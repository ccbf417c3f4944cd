"""Real trainers on a tiny model; the engine is a stand-in."""

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
from service.jobs.trainer_process import is_alive
from tests.support.jobs import LONG, SHORT, make_bench, running_bench
from tests.support.tiny import make_tiny_llama


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def home(tmp_path: Path, tiny: Path) -> Path:
    shutil.copytree(tiny, tmp_path / "models" / "tiny")
    return tmp_path


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


def is_running(pid: int | None) -> bool:
    assert pid is not None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_job_is_trained_told_registered_and_promoted(home: Path) -> None:
    async def work() -> None:
        async with running_bench(home) as bench:
            job = bench.supervisor.submit(**bench.columns(SHORT | {"validation_split": 0.25}, suffix="bot"))
            assert job.status == "running"
            job = await bench.finished(job)
            final = f"ft:tiny:tuneserve:bot:{job.id[-8:]}"
            assert (job.status, job.error, job.fine_tuned_model) == ("succeeded", None, final)
            assert bench.serving.served is not None
            assert bench.serving.served.id == final
            types = bench.types(job)
            assert types[:3] == ["queued", "running", "dataset"]
            assert types[-2:] == ["promoted", "succeeded"]
            assert types.count("step") == 4
            assert [entry.id for entry in bench.registry.of_job(job.id)] == [f"{final}:ckpt-step-2", final]
            assert all(entry.adapter_dir and entry.adapter_dir.is_dir() for entry in bench.registry.of_job(job.id))
            (checkpoint, *_) = bench.store.events(job.id, types=("checkpoint",))
            assert checkpoint["model"] == f"{final}:ckpt-step-2"
            assert "tuneserve:train_step 4.0" in bench.metrics.render().decode()
            assert 'tuneserve:jobs{status="succeeded"} 1.0' in bench.metrics.render().decode()

    run(work())


def test_a_killed_trainer_fails_its_job_with_the_reason_and_the_next_one_starts(home: Path) -> None:
    async def work() -> None:
        async with running_bench(home) as bench:
            first = bench.supervisor.submit(**bench.columns(LONG))
            second = bench.supervisor.submit(**bench.columns(SHORT, promote="manual"))
            assert bench.store.get(second.id).status == "queued"
            first = await bench.training(first)
            assert first.pid is not None
            assert os.getpriority(os.PRIO_PROCESS, first.pid) == 10
            os.kill(first.pid, signal.SIGKILL)
            first = await bench.finished(first)
            assert first.status == "failed"
            assert first.error is not None
            assert first.error.code == "trainer_died"
            assert "SIGKILL, possibly for lack of memory" in first.error.message
            assert "Loss" in first.error.log_tail
            assert bench.store.events(first.id)[-1]["log_tail"] == first.error.log_tail
            assert bench.serving.served is not None
            assert bench.serving.served.id == "tiny"
            second = await bench.finished(second)
            assert second.status == "succeeded"
            assert bench.registry.promotions("tiny") == []  # manual

    run(work())


def test_a_cancelled_job_ends_within_a_step_and_promotes_nothing(home: Path) -> None:
    async def work() -> None:
        async with running_bench(home) as bench:
            running = await bench.training(bench.supervisor.submit(**bench.columns(LONG, promote="each")))
            waiting = bench.supervisor.submit(**bench.columns(SHORT))
            assert bench.supervisor.cancel(waiting.id).status == "cancelled"
            bench.supervisor.cancel(running.id)
            assert bench.supervisor.cancel(running.id).cancel_requested  # again is fine
            running = await bench.finished(running)
            assert (running.status, running.error) == ("cancelled", None)
            types = bench.types(running)
            assert types[-1] == "cancelled"
            assert types[types.index("cancelling") :].count("step") <= 2  # the one under way, and one on its way to us
            assert not is_running(running.pid)
            assert bench.registry.promotions("tiny") == []
            with pytest.raises(ApiError) as error:
                bench.supervisor.cancel(running.id)
            assert error.value.status_code == 409
            assert error.value.headers == {"x-should-retry": "false"}

    run(work())


def test_what_the_trainer_refuses_is_the_reason_of_the_failure(home: Path) -> None:
    async def work() -> None:
        async with running_bench(home) as bench:
            job = await bench.finished(bench.supervisor.submit(**bench.columns(SHORT | {"device": "npu:7"})))
            assert job.status == "failed"
            assert job.error is not None
            assert job.error.code == "invalid_config"
            assert "npu" in job.error.message

    run(work())


def test_a_large_file_is_checked_in_the_job_and_its_mistake_is_told_with_line_and_column(home: Path) -> None:
    async def work() -> None:
        async with running_bench(home) as bench:
            columns = bench.columns(SHORT, status="validating_files", data_files=["data/large.jsonl"])
            line = '{"input": "a", "output": "b"}\n'
            large = home / "data" / "large.jsonl"
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


def test_a_stop_of_the_service_ends_the_trainer_and_the_job_begins_again(home: Path) -> None:
    async def work() -> None:
        async with running_bench(home) as bench:
            job = await bench.training(bench.supervisor.submit(**bench.columns(LONG)))
            pid = job.pid
        assert not is_running(pid)
        async with running_bench(home) as bench:
            job = await bench.training(job)
            assert (job.attempt, job.status) == (2, "running")
            assert job.pid != pid
            assert (home / "runs" / f"{job.id}.attempt2" / "events.jsonl").exists()
            bench.supervisor.cancel(job.id)
            await bench.finished(job)

    run(work())


def test_a_live_trainer_is_adopted_after_the_service_was_killed(home: Path) -> None:
    async def work() -> None:
        bench = make_bench(home)
        job = bench.store.create(**bench.columns(SHORT | {"epochs": 6, "save_every_n_steps": 1000}))
        bench.database.close()
        with supervisor_process(home) as process:
            log = home / "runs" / job.id / "events.jsonl"
            await _appears(log)
            process.send_signal(signal.SIGKILL)
            process.wait()
        async with running_bench(home) as bench:
            assert bench.store.get(job.id).attempt == 1
            done = await bench.finished(job)
            assert (done.status, done.attempt) == ("succeeded", 1)
            steps = [event["step"] for event in bench.store.events(job.id, types=("step",))]
            assert steps == list(range(1, 13))
            assert bench.types(done)[-2:] == ["promoted", "succeeded"]

    run(work())


def test_a_run_that_ended_while_the_service_was_away_is_completed_once(home: Path) -> None:
    async def work() -> None:
        bench = make_bench(home)
        job = bench.store.create(**bench.columns(SHORT))
        bench.database.close()
        with supervisor_process(home) as process:
            await _appears(home / "runs" / job.id / "events.jsonl")
            process.send_signal(signal.SIGKILL)
            process.wait()
            await _appears(home / "runs" / job.id / "result.json")
        for _ in range(2):
            async with running_bench(home) as bench:
                done = await bench.finished(job)
                assert done.status == "succeeded"
                assert bench.types(done).count("promoted") == bench.types(done).count("succeeded") == 1
                assert len(bench.registry.promotions("tiny")) == 1

    run(work())


def test_a_trainer_that_died_with_the_service_begins_again_a_bounded_number_of_times(home: Path) -> None:
    async def work() -> None:
        bench = make_bench(home)
        job = bench.store.create(**bench.columns(LONG))
        bench.database.close()
        with supervisor_process(home) as process:
            await _appears(home / "runs" / job.id / "events.jsonl")
            process.send_signal(signal.SIGKILL)
            process.wait()
        bench = make_bench(home)
        pid = bench.store.get(job.id).pid
        bench.database.close()
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(10):
            while is_alive(bench.supervisor.run_folder(job)):
                await asyncio.sleep(0.05)
        async with running_bench(home, max_job_restarts=1) as bench:
            again = await bench.training(job)
            assert again.attempt == 2
            assert bench.types(again).count("queued") == 2
        async with running_bench(home, max_job_restarts=1) as bench:
            given_up = bench.store.get(job.id)
            assert given_up.status == "failed"
            assert given_up.error is not None
            assert given_up.error.code == "too_many_restarts"

    run(work())


async def _appears(path: Path) -> None:
    async with asyncio.timeout(120):
        while not path.exists():
            await asyncio.sleep(0.05)

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from service.jobs.job import Job, JobError
from tests.support.jobs import SHORT, make_bench


async def results(job: Job) -> tuple[str, ...]:
    return (f"file-of-{job.id}",)


def test_the_results_the_error_and_the_webhook_are_there_with_the_last_event(home: Path) -> None:
    async def write_results(job: Job) -> tuple[str, ...]:
        return (f"file-of-{job.id}",)

    async def work() -> None:
        bench = make_bench(home, write_results=write_results)
        ending = bench.supervisor._ending
        good, bad = (
            bench.store.create(**bench.columns(SHORT, status="running", webhook="http://127.0.0.1:9/"))
            for _ in range(2)
        )
        await ending.write_results(good)
        await ending.write_results(good)
        ending.end(good.id, "succeeded", None)
        assert bench.store.get(good.id).result_files == (f"file-of-{good.id}",)
        error = JobError(code="out_of_memory", message="lower batch_size")
        ending.end(bad.id, "failed", error)
        assert (bench.store.get(bad.id).error, bench.store.get(bad.id).result_files) == (error, ())
        for job in (good, bad):
            delivery = bench.webhooks.of_job(job.id)
            assert delivery is not None
            assert (delivery.attempts, delivery.is_over) == (0, False)
        bench.database.close()

    asyncio.run(work())


def test_an_end_that_cannot_be_told_is_no_end(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        bench = make_bench(home)
        job = bench.store.create(**bench.columns(SHORT, status="running"))

        def fail(job: Job) -> None:
            raise RuntimeError("no more power")

        monkeypatch.setattr(bench.webhooks, "add", fail)
        with pytest.raises(RuntimeError):
            bench.supervisor._ending.end(job.id, "cancelled", None)
        assert bench.store.get(job.id).status == "running"
        assert bench.types(job) == ["running"]
        bench.database.close()

    asyncio.run(work())

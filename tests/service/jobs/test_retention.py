"""What is removed and what is pinned. Folders with a file in them stand for checkpoints; the engine is a stand-in."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from lm.errors import NotFoundError
from service.errors import ApiError
from service.jobs.job import Job
from service.jobs.retention import DELETED
from service.registry import Entry
from tests.support.jobs import Bench, make_bench
from tests.support.stub_engine import READY
from trainer.config import TrainingOptions


@pytest.fixture
def bench(home: Path) -> Bench:
    return make_bench(home)


def run(bench: Bench, work: Coroutine[Any, Any, None]) -> None:
    async def whole() -> None:
        await bench.serving.on_engine_ready(READY)
        await work

    asyncio.run(whole())
    bench.database.close()


def create(bench: Bench, **columns: Any) -> Job:
    chosen: dict[str, Any] = {
        "status": "running",
        "model": "tiny",
        "options": TrainingOptions(keep_last_n_checkpoints=2),
        "data_files": [],
        "suffix": "",
        "promote": "manual",
    }
    return bench.store.create(**chosen | columns)


def publish(bench: Bench, job: Job, step: int, *, kind: str = "adapter", **event: Any) -> Entry:
    path = f"{'adapters' if kind == 'adapter' else 'checkpoints'}/step_{step}"
    run_dir = bench.supervisor.run_folder(job).path
    (run_dir / path).mkdir(parents=True)
    (run_dir / path / "model.safetensors").write_bytes(b"weights")
    told = {"type": "checkpoint", "step": step, "kind": kind, "path": path, "final": False, **event}
    return bench.registry.get(bench.promoter.register(job, run_dir, told)["model"])


def left(bench: Bench, job: Job) -> tuple[list[int | None], list[str]]:
    """Steps in the registry, and folders on the disk."""
    folders = sorted(path.name for path in bench.supervisor.run_folder(job).adapters.iterdir())
    return [entry.step for entry in bench.registry.of_job(job.id)], folders


def keep(bench: Bench, job: Job) -> Coroutine[Any, Any, None]:
    return bench.supervisor._retention.keep_newest(job)


def test_the_newest_checkpoints_stay_and_the_best_one(bench: Bench) -> None:
    async def work() -> None:
        job = create(bench)
        for step in range(1, 7):
            publish(bench, job, step, best=step <= 2)
            await keep(bench, job)
        assert left(bench, job) == ([2, 5, 6], ["step_2", "step_5", "step_6"])
        told = bench.store.events(job.id, types=("checkpoint_removed",))
        assert [event["step"] for event in told] == [1, 3, 4]

    run(bench, work())


def test_all_stay_where_nobody_asked_for_fewer(bench: Bench) -> None:
    async def work() -> None:
        job = create(bench, options=TrainingOptions())
        for step in range(1, 5):
            publish(bench, job, step)
        await keep(bench, job)
        assert left(bench, job)[0] == [1, 2, 3, 4]

    run(bench, work())


def test_what_answers_answered_or_is_begun_from_stays(bench: Bench) -> None:
    async def work() -> None:
        job = create(bench)
        entries = [publish(bench, job, step) for step in range(1, 7)]
        await bench.serving.promote(entries[0].id, "test")
        await bench.serving.promote(entries[1].id, "test")
        create(bench, status="queued", start_from=entries[2].id)
        assert await bench.serving.acquire(entries[3].id)
        create(bench, status="succeeded", start_from=entries[4].id)
        publish(bench, job, 7)
        await keep(bench, job)
        assert left(bench, job)[0] == [1, 2, 3, 4, 6, 7]

    run(bench, work())


def test_a_checkpoint_that_an_adapter_stands_on_stays(bench: Bench) -> None:
    async def work() -> None:
        job = create(bench, options=TrainingOptions(recipe="full", keep_last_n_checkpoints=1))
        full = publish(bench, job, 1, kind="full")
        adapter = publish(bench, create(bench, start_from=full.id, status="succeeded"), 3)
        assert adapter.base_dir == full.base_dir
        publish(bench, job, 2, kind="full")
        await keep(bench, job)
        assert [entry.step for entry in bench.registry.of_job(job.id)] == [1, 2]
        bench.store.record(job.id, status="succeeded")
        with pytest.raises(ApiError, match="stands on it"):
            await bench.supervisor.delete_checkpoint(full.id)
        with pytest.raises(ApiError, match="stands on it"):
            await bench.supervisor.delete(job.id)
        await bench.supervisor.delete_checkpoint(adapter.id)
        await bench.supervisor.delete(job.id)

    run(bench, work())


def test_an_adapter_on_a_merged_start_stands_on_the_model_in_its_own_folder(bench: Bench) -> None:
    async def work() -> None:
        first = publish(bench, create(bench), 1)
        merged = create(bench, start_from=first.id, merge_start=True, status="succeeded")
        assert publish(bench, merged, 2).base_dir == bench.supervisor.run_folder(merged).base
        further = create(bench, start_from=first.id, status="succeeded")
        assert publish(bench, further, 2).base_dir == first.base_dir
        await bench.supervisor.delete(merged.id)
        assert not bench.supervisor.run_folder(merged).path.exists()

    run(bench, work())


def test_one_model_is_deleted_with_its_files_and_out_of_memory(bench: Bench) -> None:
    async def work() -> None:
        job = create(bench, status="succeeded")
        first, second = publish(bench, job, 1), publish(bench, job, 2, final=True)
        run_dir = bench.supervisor.run_folder(job).path
        for made in ("checkpoints/step_1/model.safetensors", "exports/step_1.f16.gguf", "exports/step_2.f16.gguf"):
            (run_dir / made).parent.mkdir(parents=True, exist_ok=True)
            (run_dir / made).write_bytes(b"weights")
        await bench.serving.promote(second.id, "test")
        await bench.serving.acquire(first.id)
        assert first.id in bench.engine.held
        with pytest.raises(ApiError, match="it is served") as error:
            await bench.supervisor.delete_checkpoint(second.id)
        assert error.value.status_code == 409
        await bench.supervisor.delete_checkpoint(first.id)
        assert first.id not in (*bench.engine.held, *bench.serving.loaded)
        assert left(bench, job) == ([2], ["step_2"])
        assert [path.name for path in run_dir.glob("[ce]*/*")] == ["step_2.f16.gguf"]
        with pytest.raises(NotFoundError):
            await bench.supervisor.delete_checkpoint(first.id)
        with pytest.raises(ApiError, match="base model"):
            await bench.supervisor.delete_checkpoint("tiny")

    run(bench, work())


def test_a_model_of_an_unfinished_job_is_not_deleted_alone(bench: Bench) -> None:
    async def work() -> None:
        entry = publish(bench, create(bench), 1)
        with pytest.raises(ApiError, match="is not over"):
            await bench.supervisor.delete_checkpoint(entry.id)

    run(bench, work())


def test_a_job_is_deleted_with_everything_it_made_and_a_rollback_goes_past_it(bench: Bench) -> None:
    async def work() -> None:
        older, job, newer = (create(bench, status="succeeded") for _ in range(3))
        ids = [publish(bench, each, 1, final=True).id for each in (older, job, newer)]
        for entry_id in ids:
            await bench.serving.promote(entry_id, "test")
        with pytest.raises(ApiError, match="it is served"):
            await bench.supervisor.delete(newer.id)
        await bench.supervisor.delete(job.id)
        with pytest.raises(NotFoundError):
            bench.store.get(job.id)
        assert {path.name for path in bench.settings.runs_dir.iterdir()} == {older.id, newer.id}
        assert (await bench.serving.rollback()).id == ids[0]
        await bench.supervisor.delete(newer.id)

    run(bench, work())


def test_a_checkpoint_that_is_activated_while_it_is_to_be_removed_stays(bench: Bench) -> None:
    async def work() -> None:
        job = create(bench)
        first, *_ = [publish(bench, job, step) for step in (1, 2, 3)]
        async with bench.serving.undisturbed():
            activation = asyncio.create_task(bench.serving.promote(first.id, "activate"))
            await asyncio.sleep(0)
            removal = asyncio.create_task(keep(bench, job))
            await asyncio.sleep(0)
        await asyncio.gather(activation, removal)
        assert left(bench, job) == ([1, 2, 3], ["step_1", "step_2", "step_3"])

    run(bench, work())


def test_a_job_that_is_resumed_while_it_is_deleted_is_not_deleted(bench: Bench) -> None:
    async def work() -> None:
        job = create(bench, status="failed")
        publish(bench, job, 1)
        async with bench.serving.undisturbed():
            deletion = asyncio.create_task(bench.supervisor.delete(job.id))
            await asyncio.sleep(0)
            bench.store.record(job.id, status="running")
        with pytest.raises(ApiError, match="while it is running"):
            await deletion
        assert bench.store.get(job.id).status == "running"

    run(bench, work())


@pytest.mark.parametrize("status", ["running", "validating_files"])
def test_a_job_that_is_at_work_is_not_deleted(bench: Bench, status: str) -> None:
    async def work() -> None:
        job = create(bench, status=status)
        publish(bench, job, 1)
        with pytest.raises(ApiError, match="cancel it first") as error:
            await bench.supervisor.delete(job.id)
        assert error.value.status_code == 409
        assert left(bench, job) == ([1], ["step_1"])

    run(bench, work())


def test_a_job_that_another_one_begins_from_is_not_deleted(bench: Bench) -> None:
    async def work() -> None:
        job = create(bench, status="succeeded")
        child = create(bench, status="queued", paused=True, start_from=publish(bench, job, 1).id)
        with pytest.raises(ApiError, match=f"the job {child.id} begins from it"):
            await bench.supervisor.delete(job.id)
        await bench.supervisor.delete(child.id)
        await bench.supervisor.delete(job.id)

    run(bench, work())


def test_a_deletion_that_a_crash_interrupted_is_finished_or_taken_back(bench: Bench) -> None:
    async def work() -> None:
        known = create(bench, status="succeeded")
        publish(bench, known, 1)
        folder = bench.supervisor.run_folder(known).path
        folder.rename(folder.with_name(f"{DELETED}{known.id}"))
        gone = folder.with_name(f"{DELETED}ftjob-gone.attempt2")
        gone.mkdir()
        await bench.supervisor.start()
        assert {path.name for path in bench.settings.runs_dir.iterdir()} == {known.id}
        await bench.supervisor.stop()

    run(bench, work())

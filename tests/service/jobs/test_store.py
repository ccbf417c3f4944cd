from __future__ import annotations

import asyncio
from typing import Any

import pytest

from lm.errors import NotFoundError
from service.jobs.job import Job, JobError, Progress
from service.jobs.store import JobStore, KeyTakenError
from trainer.config import TrainingOptions
from trainer.option_groups import DatasetConfig


def create(store: JobStore, **overrides: Any) -> Job:
    columns: dict[str, Any] = {
        "status": "queued",
        "model": "tiny",
        "options": TrainingOptions(),
        "data_files": ["data/a.jsonl"],
        "suffix": "",
        "promote": "final",
    }
    return store.create(**(columns | overrides))


def test_a_job_comes_back_as_it_was_created(store: JobStore) -> None:
    options = TrainingOptions.model_validate({"recipe": "full", "lora": {"rank": 3}, "learning_rate": 0.01})
    created = create(store, options=options, data_files=["data/a.jsonl", "data/b.json"], suffix="x", promote="best")
    assert store.get(created.id) == created
    assert created.options == options
    assert created.data_files == ("data/a.jsonl", "data/b.json")
    assert (created.status, created.attempt, created.cancel_requested) == ("queued", 1, False)
    assert created.error is None
    assert created.progress == Progress()


def test_what_a_job_is_told_beyond_that_comes_back_too(store: JobStore) -> None:
    hub = DatasetConfig(hub_id="a/b", weight=0.5)
    told: dict[str, Any] = {
        "datasets": (DatasetConfig(data_files=("data/a.jsonl",), column_map={"input": "q"}), hub),
        "validation": DatasetConfig(data_files=("data/held.jsonl",)),
        "validation_file_id": "file-2",
        "file_ids": ("file-1", "file-2"),
        "start_from": "ft:tiny:tuneserve::12345678",
        "merge_start": True,
        "priority": 7,
        "metadata": {"team": "a"},
        "webhook": "https://example.org/hook",
        "idempotency_key": "key",
        "request_hash": "hash",
    }
    job = create(store, file_id="file-1", **told)
    assert {name: getattr(job, name) for name in told} == told
    assert (job.paused, job.pause_requested, job.restarts, job.run_name) == (False, False, 0, job.id)
    assert job.local_sets == [told["datasets"][0], told["validation"]]
    assert create(store).local_sets == [DatasetConfig(data_files=("data/a.jsonl",))]


def test_a_key_creates_one_job(store: JobStore) -> None:
    job = create(store, idempotency_key="once", request_hash="a")
    assert store.with_key("once") == job
    assert store.with_key("never") is None
    with pytest.raises(KeyTakenError):
        create(store, idempotency_key="once", request_hash="b")
    assert [other.id for other in store.page(limit=5)[0]] == [job.id]


def test_ids_are_random_and_of_the_stated_form(store: JobStore) -> None:
    ids = [create(store).id for _ in range(50)]
    assert len(set(ids)) == 50
    assert all(id.startswith("ftjob-") and len(id) == 30 and id[6:].isalnum() for id in ids)


def test_the_first_event_tells_the_first_status(store: JobStore) -> None:
    job = create(store, status="validating_files")
    (event,) = store.events(job.id)
    assert (event["id"], event["type"]) == (1, "validating_files")


def test_columns_and_events_change_together_or_not_at_all(store: JobStore) -> None:
    job = create(store)
    with pytest.raises(Exception, match="no such column"):
        store.record(job.id, [{"type": "running"}], status="running", no_such_column=1)
    assert store.get(job.id).status == "queued"
    assert [event["type"] for event in store.events(job.id)] == ["queued"]
    error = JobError(code="trainer_died", message="it died", log_tail="last words")
    store.record(job.id, [{"type": "failed", "code": "trainer_died"}], status="failed", error=error)
    assert store.get(job.id).error == error
    assert store.events(job.id)[-1]["code"] == "trainer_died"


def test_events_are_numbered_within_their_job_and_keep_their_own_time(store: JobStore) -> None:
    first, second = create(store), create(store)
    store.record(first.id, [{"type": "step", "time": 5.5, "loss": 1.0}, {"type": "step", "time": 6.0, "loss": 0.5}])
    store.record(second.id, [{"type": "running"}])
    assert [event["id"] for event in store.events(first.id)] == [1, 2, 3]
    assert [event["id"] for event in store.events(second.id)] == [1, 2]
    assert store.events(first.id, after=1, limit=1) == [{"id": 2, "type": "step", "time": 5.5, "loss": 1.0}]
    assert [event["loss"] for event in store.events(first.id, types=("step",))] == [1.0, 0.5]


def test_pages_are_newest_first_and_complete(store: JobStore) -> None:
    ids = [create(store).id for _ in range(5)][::-1]
    first, more = store.page(limit=2)
    second, still_more = store.page(limit=3, after=first[-1].id)
    assert [job.id for job in first + second] == ids
    assert (more, still_more) == (True, False)
    with pytest.raises(NotFoundError):
        store.page(limit=2, after="ftjob-none")


def test_pages_can_be_of_the_jobs_with_some_metadata_or_with_none(store: JobStore) -> None:
    first = create(store, metadata={"team": "a", "run": "1"}).id
    second = create(store, metadata={"team": "a", "run": "2"}).id
    without = create(store).id

    def ids(metadata: dict[str, str] | None) -> list[str]:
        return [job.id for job in store.page(limit=5, metadata=metadata)[0]]

    assert ids(None) == [without, second, first]
    assert ids({"team": "a"}) == [second, first]
    assert ids({"team": "a", "run": "1"}) == [first]
    assert ids({"team": "1"}) == ids({"' OR 1": "a"}) == []
    assert ids({}) == [without]


def test_the_queue_is_by_priority_and_then_oldest_first(store: JobStore) -> None:
    low, first, second, high = [create(store, priority=priority).id for priority in (-1, 0, 0, 5)]
    paused = create(store, paused=True, priority=9).id
    assert [job.id for job in store.queue()] == [high, first, second, low]
    assert [job.id for job in store.with_status("queued", "running")] == [low, first, second, high, paused]
    assert store.counts() == {"queued": 5}


def test_a_deleted_job_leaves_nothing_behind(store: JobStore) -> None:
    job, other = create(store, idempotency_key="key"), create(store)
    changed = store.changed(job.id)
    store.delete(job.id)
    assert changed.is_set()
    with pytest.raises(NotFoundError):
        store.get(job.id)
    assert store.events(job.id) == []
    assert [event["type"] for event in store.events(other.id)] == ["queued"]
    create(store, idempotency_key="key")


def test_an_unknown_job_is_named(store: JobStore) -> None:
    with pytest.raises(NotFoundError, match="ftjob-none"):
        store.get("ftjob-none")


def test_a_file_is_in_use_until_its_job_is_over(store: JobStore) -> None:
    job = create(store, file_id="file-1")
    assert store.uses_file("file-1") == job.id
    held_out = create(store, file_ids=("file-2", "file-3"))
    assert store.uses_file("file-3") == held_out.id
    store.record(job.id, status="succeeded")
    assert store.uses_file("file-1") is None


def test_followers_are_woken_by_a_change_of_their_job_only(store: JobStore) -> None:
    first, second = create(store), create(store)
    changed = store.changed(first.id)
    store.record(second.id, [{"type": "running"}])
    assert not changed.is_set()
    store.record(first.id, [{"type": "running"}])
    assert changed.is_set()
    assert not store.changed(first.id).is_set()
    assert isinstance(changed, asyncio.Event)


def test_progress_keeps_the_newest_event_of_each_kind_and_estimates_the_rest(store: JobStore) -> None:
    job = create(store)
    progress = job.progress
    assert progress.eta_s is None
    for step, time in ((1, 100.0), (2, 104.0), (3, 108.0)):
        progress = progress.after({"type": "step", "step": step, "total_steps": 10, "time": time})
    progress = progress.after({"type": "warning", "message": "ignored"})
    store.record(job.id, progress=progress)
    kept = store.get(job.id).progress
    assert kept == progress
    assert kept.step is not None
    assert kept.step["step"] == 3
    assert kept.eta_s == pytest.approx(7 * 4.0)


def test_the_pace_begins_anew_where_a_run_goes_on(store: JobStore) -> None:
    progress = Progress()
    for step, time in ((1, 100.0), (2, 104.0)):
        progress = progress.after({"type": "step", "step": step, "total_steps": 10, "time": time})
    progress = progress.after({"type": "resumed", "step": 2, "time": 9000.0})
    assert progress.eta_s is None
    for step, time in ((3, 9001.0), (4, 9003.0)):
        progress = progress.after({"type": "step", "step": step, "total_steps": 10, "time": time})
    assert progress.eta_s == pytest.approx(6 * 2.0)

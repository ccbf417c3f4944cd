from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from service.jobs.job import Job, Promote
from service.jobs.promotion import Promoter
from service.jobs.store import JobStore
from service.metrics import Metrics
from service.registry import Registry
from service.serving import Serving
from service.settings import Settings
from tests.support.stub_engine import READY, StubEngine
from trainer.config import TrainingOptions


@pytest.fixture
def engine() -> StubEngine:
    return StubEngine()


@pytest.fixture
def promoter(home: Path, store: JobStore, registry: Registry, engine: StubEngine) -> Promoter:
    serving = Serving(engine, registry, Settings(home=home, model="tiny"), Metrics("tiny"))
    return Promoter(store, registry, serving)


def create(promoter: Promoter, promote: Promote = "final", *, model: str = "tiny") -> Job:
    return promoter.store.create(
        status="running", model=model, options=TrainingOptions(), data_files=[], suffix="", promote=promote
    )


def checkpoint(step: int, *, final: bool = False, validation_loss: float | None = None, **more: Any) -> dict[str, Any]:
    event = {"type": "checkpoint", "step": step, "kind": "adapter", "path": f"adapters/step_{step}", "loss": 1.0}
    return event | {"final": final, "validation_loss": validation_loss} | more


def register(promoter: Promoter, job: Job, home: Path, *losses: float | None) -> list[str]:
    """A checkpoint for each validation loss; their ids."""
    run = home / "runs" / job.id
    events = [
        checkpoint(step, final=step == len(losses), validation_loss=loss) for step, loss in enumerate(losses, start=1)
    ]
    return [promoter.register(job, run, event)["model"] for event in events]


async def start(promoter: Promoter) -> None:
    await promoter.serving.on_engine_ready(READY)


def served(promoter: Promoter) -> str:
    assert promoter.serving.served is not None
    return promoter.serving.served.id


def types(promoter: Promoter, job: Job) -> list[str]:
    return [event["type"] for event in promoter.store.events(job.id)]


@pytest.mark.parametrize(("rule", "chosen"), [("final", 2), ("each", 2), ("best", 1), ("manual", None)])
def test_the_rule_of_the_job_chooses_at_its_end(
    promoter: Promoter, home: Path, rule: Promote, chosen: int | None
) -> None:
    async def work() -> None:
        await start(promoter)
        job = create(promoter, rule)
        ids = register(promoter, job, home, 3.0, 1.0, 2.0)
        await promoter.at_end(job)
        assert served(promoter) == ("tiny" if chosen is None else ids[chosen])
        assert ("promoted" in types(promoter, job)) == (chosen is not None)

    asyncio.run(work())


@pytest.mark.parametrize(("rule", "expected"), [("each", True), ("final", False), ("best", False), ("manual", False)])
def test_only_each_promotes_while_the_job_runs(promoter: Promoter, home: Path, rule: Promote, expected: bool) -> None:
    async def work() -> None:
        await start(promoter)
        job = create(promoter, rule)
        event = promoter.register(job, home / "runs" / job.id, checkpoint(1))
        await promoter.during(job, event)
        assert (served(promoter) == event["model"]) is expected

    asyncio.run(work())


def test_an_end_that_is_told_twice_promotes_once_and_keeps_what_a_person_chose_since(
    promoter: Promoter, home: Path
) -> None:
    async def work() -> None:
        await start(promoter)
        job = create(promoter)
        register(promoter, job, home, None)
        await promoter.at_end(job)
        await promoter.serving.rollback()
        await promoter.at_end(job)
        assert served(promoter) == "tiny"
        assert types(promoter, job).count("promoted") == 1

    asyncio.run(work())


def test_a_checkpoint_that_cannot_be_loaded_is_told_in_the_job(
    promoter: Promoter, home: Path, engine: StubEngine
) -> None:
    async def work() -> None:
        await start(promoter)
        job = create(promoter)
        (entry_id,) = register(promoter, job, home, None)
        engine.broken.add(entry_id)
        await promoter.at_end(job)
        assert served(promoter) == "tiny"
        assert promoter.store.events(job.id)[-1] | {"time": 0} == {
            "id": 2,
            "type": "promotion_failed",
            "time": 0,
            "model": entry_id,
            "message": "missing tensor",
        }

    asyncio.run(work())


def test_a_promotion_waits_for_an_engine_that_comes_back(promoter: Promoter, home: Path, engine: StubEngine) -> None:
    async def work() -> None:
        await start(promoter)
        job = create(promoter)
        (entry_id,) = register(promoter, job, home, None)
        engine.deadly.add(entry_id)
        promotion = asyncio.create_task(promoter.at_end(job))
        await asyncio.sleep(0.05)
        assert engine.ready is None  # it died while loading
        engine.deadly.clear()
        engine.ready = READY
        await start(promoter)
        await promotion
        assert served(promoter) == entry_id

    asyncio.run(work())


def test_a_job_on_another_base_is_registered_and_not_promoted(promoter: Promoter, home: Path) -> None:
    (home / "models" / "other").mkdir()
    (home / "models" / "other" / "config.json").write_text("{}")

    async def work() -> None:
        await start(promoter)
        job = create(promoter, model="other")
        (entry_id,) = register(promoter, job, home, None)
        await promoter.at_end(job)
        assert served(promoter) == "tiny"
        assert types(promoter, job)[-1] == "not_promoted"
        assert promoter.registry.get(entry_id).base == "other"

    asyncio.run(work())


def test_a_merged_model_is_not_a_second_entry(promoter: Promoter, home: Path) -> None:
    job = create(promoter)
    event = checkpoint(1, final=True, kind="merged", path="checkpoints/step_1")
    assert promoter.register(job, home / "runs" / job.id, event) == event
    assert promoter.registry.of_job(job.id) == []

"""What is promoted, and who waits, while the engine sleeps and wakes up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from service.registry import Entry, Registry
from service.serving import NoEngineError, Serving, SwapError
from tests.support.stub_engine import READY, StubEngine


async def started(serving: Serving) -> Serving:
    await serving.on_engine_ready(READY)
    return serving


def served(serving: Serving) -> str:
    assert serving.served is not None
    return serving.served.id


def asleep(serving: Serving, engine: StubEngine) -> None:
    serving.gate.close("the engine sleeps while a job trains")
    serving.gate.sleep()
    engine.ready = None


async def woken(serving: Serving, engine: StubEngine) -> None:
    engine.ready, engine.held = READY, []
    await serving.on_engine_ready(READY)
    serving.gate.open()


def test_what_is_promoted_while_the_engine_wakes_up_is_the_only_one_that_it_loads(
    make_serving: Callable[..., Serving], checkpoints: list[Entry], registry: Registry, engine: StubEngine
) -> None:
    async def run() -> None:
        serving = await started(make_serving(max_loaded_models=1))
        asleep(serving, engine)
        promotion = asyncio.create_task(serving.promote_when_serving(checkpoints[1].id, "job", 60))
        waiting = asyncio.create_task(serving.acquire(None))
        serving.gate.patience_s, serving.gate.limit = 60, 1
        await asyncio.sleep(0.15)
        assert not promotion.done()  # however long it sleeps
        serving.gate.wake()
        await asyncio.sleep(0.15)
        await woken(serving, engine)
        assert (await promotion).id == (await waiting).id == served(serving) == checkpoints[1].id
        assert engine.held == [checkpoints[1].id]
        assert [promotion.entry_id for promotion in registry.promotions("tiny")] == [checkpoints[1].id]

    asyncio.run(run())


def test_where_that_cannot_be_loaded_what_served_before_comes_back(
    make_serving: Callable[..., Serving], checkpoints: list[Entry], registry: Registry, engine: StubEngine
) -> None:
    async def run() -> None:
        serving = await started(make_serving())
        asleep(serving, engine)
        serving.gate.wake()
        engine.broken.add(checkpoints[1].id)
        promotion = asyncio.create_task(serving.promote_when_serving(checkpoints[1].id, "job", 60))
        await asyncio.sleep(0)
        await woken(serving, engine)
        with pytest.raises(SwapError, match="missing tensor"):
            await promotion
        assert (served(serving), registry.promotions("tiny")) == ("tiny", [])

    asyncio.run(run())


def test_nothing_is_activated_by_hand_while_the_engine_sleeps(
    make_serving: Callable[..., Serving], checkpoints: list[Entry], engine: StubEngine
) -> None:
    async def run() -> None:
        serving = await started(make_serving())
        asleep(serving, engine)
        assert serving.loaded == ()
        with pytest.raises(NoEngineError, match="sleeps while a job trains"):
            await serving.promote(checkpoints[0].id, "activate")

    asyncio.run(run())

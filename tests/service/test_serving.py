from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from lm.errors import NotFoundError
from service.engine.messages import LoadModel, ModelLoaded
from service.engine_client import ModelLoadError
from service.errors import ApiError
from service.jobs.store import JobStore
from service.metrics import Metrics
from service.registry import Entry, Registry
from service.serving import Serving, SwapError
from tests.support.stub_engine import READY, StubEngine


async def started(serving: Serving) -> Serving:
    await serving.on_engine_ready(READY)
    return serving


def served(serving: Serving) -> str:
    assert serving.served is not None
    return serving.served.id


def test_without_promotions_latest_is_the_base(make_serving: Callable[..., Serving]) -> None:
    async def run() -> None:
        serving = await started(make_serving(served_model_aliases=["gpt-4"]))
        for name in (None, "latest", "tiny", "gpt-4"):
            assert (await serving.acquire(name)).id == "tiny"
        assert serving.weights_hash("tiny") == "hash of tiny"
        assert serving.since is None

    asyncio.run(run())


def test_before_the_engine_has_loaded_something_requests_are_told_to_wait(make_serving: Callable[..., Serving]) -> None:
    async def run() -> None:
        with pytest.raises(ApiError) as error:
            await make_serving().acquire(None)
        assert error.value.status_code == 503
        assert error.value.headers == {"Retry-After": "5"}

    asyncio.run(run())


def test_an_unknown_model_is_refused_unless_settings_allow_it(make_serving: Callable[..., Serving]) -> None:
    async def run() -> None:
        with pytest.raises(NotFoundError, match="gpt-4"):
            await (await started(make_serving())).acquire("gpt-4")
        assert (await (await started(make_serving(allow_unknown_model=True))).acquire("gpt-4")).id == "tiny"

    asyncio.run(run())


def test_a_promotion_changes_latest_and_is_kept(
    make_serving: Callable[..., Serving], checkpoints: list[Entry], registry: Registry, engine: StubEngine
) -> None:
    async def run() -> None:
        serving = await started(make_serving())
        await serving.promote(checkpoints[0].id, "test")
        assert engine.commands[-1].replaces == "tiny"  # so that a device which holds one set can swap, too
        assert (await serving.acquire(None)).id == checkpoints[0].id
        assert (await serving.acquire("tiny")).id == "tiny"
        assert [promotion.entry_id for promotion in registry.promotions("tiny")] == [checkpoints[0].id]
        restarted = await started(make_serving())
        assert served(restarted) == checkpoints[0].id
        assert restarted.since == registry.last_change("tiny")

    asyncio.run(run())


def test_promoting_what_is_served_already_changes_nothing(
    make_serving: Callable[..., Serving], checkpoints: list[Entry], registry: Registry
) -> None:
    async def run() -> None:
        serving = await started(make_serving())
        await asyncio.gather(*(serving.promote(checkpoints[0].id, "test") for _ in range(3)))
        assert len(registry.promotions("tiny")) == 1

    asyncio.run(run())


def test_a_load_that_fails_leaves_the_old_weights_and_no_promotion(
    make_serving: Callable[..., Serving], checkpoints: list[Entry], registry: Registry, engine: StubEngine
) -> None:
    async def run() -> None:
        serving = await started(make_serving())
        engine.broken.add(checkpoints[0].id)
        with pytest.raises(SwapError, match="missing tensor"):
            await serving.promote(checkpoints[0].id, "test")
        assert served(serving) == "tiny"
        assert registry.promotions("tiny") == []
        assert (await serving.acquire(None)).id == "tiny"

    asyncio.run(run())


def test_swaps_wait_for_each_other_and_the_last_one_serves(
    make_serving: Callable[..., Serving], checkpoints: list[Entry]
) -> None:
    async def run() -> None:
        serving = await started(make_serving())
        await asyncio.gather(*(serving.promote(entry.id, "test") for entry in checkpoints))
        assert served(serving) == checkpoints[1].id

    asyncio.run(run())


def test_rollbacks_go_down_the_stack_to_the_base_and_no_further(
    make_serving: Callable[..., Serving], checkpoints: list[Entry]
) -> None:
    async def run() -> None:
        serving = await started(make_serving())
        for entry in checkpoints:
            await serving.promote(entry.id, "test")
        assert (await serving.rollback()).id == checkpoints[0].id
        assert (await serving.rollback()).id == "tiny"
        with pytest.raises(ApiError) as error:
            await serving.rollback()
        assert error.value.status_code == 409
        assert served(await started(make_serving())) == "tiny"

    asyncio.run(run())


def test_a_rollback_that_fails_takes_nothing_back(
    make_serving: Callable[..., Serving], checkpoints: list[Entry], engine: StubEngine, registry: Registry
) -> None:
    async def run() -> None:
        serving = await started(make_serving(max_loaded_models=1))
        for entry in checkpoints:
            await serving.promote(entry.id, "test")
        engine.broken.add(checkpoints[0].id)
        with pytest.raises(SwapError):
            await serving.rollback()
        assert served(serving) == checkpoints[1].id
        assert len(registry.promotions("tiny")) == 2

    asyncio.run(run())


def test_a_broken_promotion_at_the_start_gives_way_to_the_one_before_it_and_is_told(
    make_serving: Callable[..., Serving], checkpoints: list[Entry], engine: StubEngine
) -> None:
    async def run() -> None:
        serving = await started(make_serving())
        for entry in checkpoints:
            await serving.promote(entry.id, "test")
        engine.broken.add(checkpoints[1].id)
        restarted = await started(make_serving())
        assert served(restarted) == checkpoints[0].id
        assert restarted.problems == [f"{checkpoints[1].id} could not be loaded: missing tensor"]
        assert (await restarted.rollback()).id == "tiny"

    asyncio.run(run())


def test_an_entry_that_kills_the_engine_is_given_up_after_the_second_time(
    make_serving: Callable[..., Serving], checkpoints: list[Entry], engine: StubEngine
) -> None:
    async def run() -> None:
        serving = await started(make_serving())
        await serving.promote(checkpoints[0].id, "test")
        engine.deadly.add(checkpoints[0].id)
        for _ in range(2):  # as the client does: a new process, on_ready, a death
            engine.ready = READY
            await serving.on_engine_ready(READY)
            assert engine.ready is None
        engine.ready = READY
        await serving.on_engine_ready(READY)
        assert served(serving) == "tiny"
        assert "died while loading" in serving.problems[0]

    asyncio.run(run())


def test_a_restarted_engine_gets_the_same_entries_again(
    make_serving: Callable[..., Serving], checkpoints: list[Entry], engine: StubEngine
) -> None:
    async def run() -> None:
        serving = await started(make_serving())
        await serving.promote(checkpoints[0].id, "test")
        await serving.acquire("tiny")
        held = set(engine.held)
        engine.held.clear()
        await serving.on_engine_ready(READY)
        assert set(engine.held) == held == {"tiny", checkpoints[0].id}
        assert serving.problems == []

    asyncio.run(run())


def test_an_entry_is_loaded_on_request_and_the_least_recently_used_one_goes(
    make_serving: Callable[..., Serving], checkpoints: list[Entry], engine: StubEngine
) -> None:
    async def run() -> None:
        serving = await started(make_serving(max_loaded_models=2))
        first, second = checkpoints
        assert {(await serving.acquire(first.id)).id for _ in range(3)} == {first.id}
        await asyncio.gather(*(serving.acquire(second.id) for _ in range(3)))
        assert engine.held == ["tiny", second.id]  # the served one stays
        assert len(engine.commands) == 3
        await serving.acquire(first.id)
        assert set(serving.loaded) == {"tiny", first.id}

    asyncio.run(run())


def test_a_broken_entry_that_a_request_names_is_no_reason_to_ask_again(
    make_serving: Callable[..., Serving], checkpoints: list[Entry], engine: StubEngine
) -> None:
    async def run() -> None:
        serving = await started(make_serving())
        engine.broken.add(checkpoints[0].id)
        with pytest.raises(ApiError, match="could not be loaded: missing tensor") as broken:
            await serving.acquire(checkpoints[0].id)
        assert (broken.value.status_code, broken.value.param) == (409, "model")
        assert broken.value.headers == {"x-should-retry": "false"}
        engine.deadly.add(checkpoints[1].id)
        with pytest.raises(ApiError, match="the engine died") as dead:
            await serving.acquire(checkpoints[1].id)
        assert dead.value.status_code == 503

    asyncio.run(run())


def test_with_room_for_one_only_the_served_entry_answers(
    make_serving: Callable[..., Serving], checkpoints: list[Entry], engine: StubEngine
) -> None:
    async def run() -> None:
        serving = await started(make_serving(max_loaded_models=1))
        with pytest.raises(ApiError, match="max_loaded_models") as error:
            await serving.acquire(checkpoints[0].id)
        assert error.value.status_code == 503
        await serving.promote(checkpoints[0].id, "test")
        assert engine.held == [checkpoints[0].id]
        assert engine.commands[-1].replaces == "tiny"

    asyncio.run(run())


def test_another_base_is_never_swapped_in(
    make_serving: Callable[..., Serving], store: JobStore, registry: Registry, home: Path
) -> None:
    (home / "models" / "other").mkdir()
    (home / "models" / "other" / "config.json").write_text("{}")

    async def run() -> None:
        serving = await started(make_serving())
        with pytest.raises(NotFoundError, match="serves tiny"):
            await serving.promote("other", "test")
        with pytest.raises(NotFoundError, match="model=other"):
            await serving.acquire("other")
        assert [entry.id for entry in serving.servable()] == ["tiny"]

    asyncio.run(run())


def test_swaps_are_counted_by_their_result(
    make_serving: Callable[..., Serving], checkpoints: list[Entry], engine: StubEngine
) -> None:
    async def run() -> None:
        metrics = Metrics("tiny")
        serving = await started(make_serving())
        serving._metrics = metrics
        engine.broken.add(checkpoints[1].id)
        await serving.promote(checkpoints[0].id, "test")
        with pytest.raises(SwapError):
            await serving.promote(checkpoints[1].id, "test")
        text = metrics.render().decode()
        assert 'tuneserve:weights_swaps_total{result="succeeded"} 1.0' in text
        assert 'tuneserve:weights_swaps_total{result="failed"} 1.0' in text
        assert f'model="{checkpoints[0].id}"' in text

    asyncio.run(run())


def test_a_client_that_leaves_while_its_model_loads_leaves_no_set_of_weights_that_nobody_knows(
    make_serving: Callable[..., Serving], checkpoints: list[Entry], engine: StubEngine
) -> None:
    async def run() -> None:
        serving = await started(make_serving(max_loaded_models=2))
        first, second = checkpoints
        await serving.acquire(first.id)
        leaving = asyncio.create_task(serving.acquire(second.id))
        while len(engine.commands) < 3:
            await asyncio.sleep(0)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        await serving.acquire(second.id)
        assert set(serving.loaded) == set(engine.held) == {"tiny", second.id}
        assert len(engine.commands) == 3

    asyncio.run(run())


def test_weights_that_the_engine_lost_are_loaded_again_for_the_next_request(
    make_serving: Callable[..., Serving], checkpoints: list[Entry], engine: StubEngine
) -> None:
    async def run() -> None:
        serving = await started(make_serving(max_loaded_models=1))
        await serving.promote(checkpoints[0].id, "test")
        engine.held.clear()
        await serving.forget(checkpoints[0])
        assert (await serving.acquire(None)).id == checkpoints[0].id
        assert engine.held == [checkpoints[0].id]

    asyncio.run(run())


def test_a_request_that_a_swap_left_without_weights_waits_until_the_swap_is_over(
    make_serving: Callable[..., Serving], checkpoints: list[Entry]
) -> None:
    async def run() -> None:
        serving = await started(make_serving(max_loaded_models=1))
        swap = asyncio.create_task(serving.promote(checkpoints[0].id, "test"))
        await asyncio.sleep(0)
        assert serving.served is not None
        await serving.forget(serving.served)
        assert serving.loaded == (checkpoints[0].id,)
        assert (await serving.acquire(None)).id == checkpoints[0].id
        await swap

    asyncio.run(run())


def test_a_problem_is_over_once_its_entry_has_been_loaded(
    make_serving: Callable[..., Serving], checkpoints: list[Entry], engine: StubEngine
) -> None:
    async def run() -> None:
        serving = await started(make_serving())
        await serving.promote(checkpoints[0].id, "test")
        engine.broken.add(checkpoints[0].id)
        restarted = await started(make_serving())
        assert len(restarted.problems) == 1
        engine.broken.clear()
        await restarted.promote(checkpoints[0].id, "test")
        assert restarted.problems == []

    asyncio.run(run())


def test_a_load_that_fails_tells_no_path_of_the_machine(
    make_serving: Callable[..., Serving],
    checkpoints: list[Entry],
    engine: StubEngine,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def load_model(command: LoadModel, /) -> ModelLoaded:
        raise ModelLoadError(f"{command.adapter_dir}/adapter_model.safetensors is not readable")

    async def run() -> None:
        serving = await started(make_serving())
        monkeypatch.setattr(engine, "load_model", load_model)
        with pytest.raises(SwapError) as swap:
            await serving.promote(checkpoints[0].id, "test")
        with pytest.raises(ApiError) as request:
            await serving.acquire(checkpoints[0].id)
        for message in (str(swap.value), str(request.value)):
            assert f"runs/{checkpoints[0].job_id}/adapters/step_1/adapter_model.safetensors" in message
            assert str(home) not in message

    asyncio.run(run())

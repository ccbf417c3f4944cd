"""What the arbiter decides, and what it does about it, with a scripted engine behind the whole service."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from service.jobs.arbiter import DeviceArbiter
from service.jobs.job import Job
from tests.support.api import BASE, Api, running_api
from tests.support.scripted_engine import READY
from trainer.config import TrainingOptions

GB = 10**9
CARD = msgspec.structs.replace(READY, device="npu:0", memory_total=64 * GB, memory_needed=20 * GB)
REQUEST = {"prompt": "a", "max_tokens": 2}


def new_job(api: Api, **options: Any) -> Job:
    async def create() -> Job:  # on the thread of the database
        return api.services.store.create(
            status="running",
            model=BASE,
            options=TrainingOptions.model_validate(options),
            data_files=[],
            suffix="",
            promote="final",
        )

    return api.run(create())


def arbiter_of(api: Api) -> DeviceArbiter:
    return api.services.arbiter


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with running_api(tmp_path) as api:
        yield api


@pytest.fixture
def asleep(tmp_path: Path) -> Iterator[Api]:
    """A service that is told to sleep; its requests wait for a moment only."""
    with running_api(tmp_path, serving_while_training="sleep", sleep_wait_seconds=0) as api:
        yield api


def test_on_a_cpu_both_run_and_the_trainer_lets_others_go_first(api: Api) -> None:
    job = new_job(api, device="cpu")
    assert arbiter_of(api).plan(job).mode == "share"
    limits = arbiter_of(api).limits(job)
    assert (limits.nice, limits.memory_fraction) == (True, None)
    assert limits.num_threads is not None


def test_the_threads_of_a_trainer_are_what_the_settings_say(tmp_path: Path) -> None:
    with running_api(tmp_path, training_num_threads=7) as api:
        assert arbiter_of(api).limits(new_job(api, device="cpu")).num_threads == 7


def test_on_another_device_nobody_is_in_the_way(api: Api) -> None:
    api.engine.known = CARD
    for device in ("npu:1", "cpu"):
        job = new_job(api, device=device)
        assert arbiter_of(api).plan(job).mode == "apart"
        limits = arbiter_of(api).limits(job)
        assert (limits.num_threads, limits.memory_fraction, limits.nice) == (None, None, False)


@pytest.mark.parametrize("device", ["auto", "npu", "npu:0"])
def test_a_card_is_shared_where_both_fit_and_else_the_engine_sleeps(api: Api, device: str) -> None:
    api.engine.known = CARD
    job = new_job(api, device=device)
    fits, too_much = (arbiter_of(api).plan(job, needed * GB) for needed in (40, 41))
    assert (fits.mode, too_much.mode) == ("share", "sleep")
    assert "41.0 GB" in too_much.reason
    assert fits.memory_fraction == pytest.approx((0.95 * 64 - 20) / 64)


def test_without_an_estimate_of_the_caller_the_arbiter_makes_one(api: Api) -> None:
    api.engine.known = CARD
    assert arbiter_of(api).plan(new_job(api)).mode == "share"  # the model has 70,000 weights
    api.engine.known = msgspec.structs.replace(CARD, memory_needed=60_600_000_000)
    assert arbiter_of(api).plan(new_job(api)).mode == "sleep"


def test_a_card_is_shared_by_budgets_where_the_settings_say_so(tmp_path: Path) -> None:
    with running_api(tmp_path, serving_while_training="share", training_memory_share=0.3) as api:
        api.engine.known = CARD
        job = new_job(api, device="npu")
        assert arbiter_of(api).plan(job, 10**15).mode == "share"
        assert arbiter_of(api).limits(job).memory_fraction == 0.3


def test_a_card_of_which_nothing_is_known_is_left_to_the_trainer(api: Api) -> None:
    api.engine.known = msgspec.structs.replace(CARD, memory_total=0)
    assert arbiter_of(api).plan(new_job(api)).mode == "sleep"


def test_the_engine_sleeps_until_the_last_job_that_needs_it_is_over(asleep: Api) -> None:
    arbiter, engine = arbiter_of(asleep), asleep.engine
    first, second = new_job(asleep), new_job(asleep)
    asleep.run(arbiter.make_room(first))
    asleep.run(arbiter.make_room(second))
    assert (engine.state, asleep.services.is_ready) == ("asleep", False)
    assert (arbiter.limits(first).num_threads, arbiter.limits(first).nice) == (None, False)
    answer = asleep.post("/generate", REQUEST)
    assert answer.status_code == 503
    assert first.id in answer.json()["error"]["message"]
    asleep.run(arbiter.give_back(first))
    assert engine.state == "asleep"
    asleep.run(arbiter.give_back(second))
    asleep.run(arbiter.give_back(second))
    asleep.run(awake(asleep))
    assert asleep.post("/generate", REQUEST).status_code == 200
    assert engine.loaded == [BASE]  # a new process, which had nothing


def test_what_is_asked_about_tokens_and_models_needs_no_engine_that_is_awake(asleep: Api) -> None:
    asleep.run(arbiter_of(asleep).make_room(new_job(asleep)))
    assert asleep.post("/tokenize", {"prompt": "a"}).json()["max_model_len"] == READY.max_model_len
    assert asleep.get("/v1/models").json()["data"][0]["max_model_len"] == READY.max_model_len
    assert asleep.get("/health").status_code == 200


def test_a_wait_for_room_that_is_cut_off_leaves_an_engine_that_answers(tmp_path: Path) -> None:
    with running_api(tmp_path, serving_while_training="sleep", drain_seconds=60) as api:
        api.engine.stays_after = 1
        asked = api.start(api.async_client.post("/generate", json=REQUEST))
        api.run(until_running(api))
        room = api.start(arbiter_of(api).make_room(job := new_job(api)))
        api.run(until_closing(api))
        room.cancel()
        api.run(arbiter_of(api).give_back(job))
        api.run(awake(api))
        api.engine.stays_after = None
        assert api.post("/generate", REQUEST).status_code == 200
        asked.cancel()


def test_running_requests_are_cut_off_at_the_drain_limit(tmp_path: Path) -> None:
    with running_api(tmp_path, serving_while_training="sleep", drain_seconds=0.1) as api:
        api.engine.stays_after = 1
        asked = api.start(api.async_client.post("/generate", json=REQUEST))
        api.run(until_running(api))
        api.run(arbiter_of(api).make_room(new_job(api)))
        answer = asked.result(20).json()
        assert answer["choices"][0]["finish_reason"] == "abort"
        assert api.engine.state == "asleep"


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not is_so():
            await asyncio.sleep(0.001)


async def awake(api: Api) -> None:
    await until(lambda: not api.services.is_asleep)


async def until_running(api: Api) -> None:
    await until(lambda: api.engine.num_open == 1)


async def until_closing(api: Api) -> None:
    await until(lambda: api.services.is_asleep)

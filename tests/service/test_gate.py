from __future__ import annotations

import asyncio

import pytest

from service.errors import ApiError
from service.gate import LONGEST_RETRY_S, SHORTEST_RETRY_S, Gate


async def refused(gate: Gate) -> ApiError:
    with pytest.raises(ApiError) as error:
        await gate.passed()
    assert error.value.status_code == 503
    return error.value


def test_an_open_gate_holds_nobody() -> None:
    asyncio.run(Gate(patience_s=0, limit=0).passed())


def test_who_waits_goes_on_when_it_opens_and_before_it_closes_again() -> None:
    async def run() -> None:
        gate = Gate(patience_s=60, limit=4)
        gate.close("the engine sleeps")
        order: list[str] = []

        async def request() -> None:
            await gate.passed()
            order.append("request")

        waiting = [asyncio.create_task(request()) for _ in range(3)]
        await asyncio.sleep(0)
        assert gate.num_waiting == 3
        gate.open()
        asyncio.get_running_loop().call_soon(order.append, "next")
        await asyncio.gather(*waiting)
        assert (order, gate.num_waiting) == (["request"] * 3 + ["next"], 0)

    asyncio.run(run())


def test_who_has_waited_long_enough_or_is_one_too_many_is_told_when_to_come_back() -> None:
    async def run() -> None:
        gate = Gate(patience_s=0.01, limit=1)
        gate.close("the engine sleeps while the job j trains", seconds_left=lambda: 41.2)
        error = await refused(gate)
        assert (error.headers, "the job j" in error.detail) == ({"Retry-After": "42"}, True)
        gate.patience_s = 60
        first = asyncio.create_task(gate.passed())
        await asyncio.sleep(0)
        await refused(gate)
        gate.open()
        await first

    asyncio.run(run())


@pytest.mark.parametrize(
    ("left", "told"), [(None, SHORTEST_RETRY_S), (0.0, SHORTEST_RETRY_S), (86_400.0, LONGEST_RETRY_S)]
)
def test_the_time_to_come_back_is_bounded(left: float | None, told: int) -> None:
    gate = Gate(patience_s=0, limit=0)
    gate.close("it sleeps", seconds_left=lambda: left)
    assert gate.retry_after == told


def test_nobody_waits_for_a_service_that_ends() -> None:
    async def run() -> None:
        gate = Gate(patience_s=60, limit=4)
        gate.close("the engine sleeps")
        waiting = asyncio.create_task(refused(gate))
        await asyncio.sleep(0)
        gate.shut()
        await waiting
        await refused(gate)

    asyncio.run(run())

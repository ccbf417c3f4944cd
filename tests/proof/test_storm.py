"""Hundreds of clients that hang up, and an engine that dies under load: nothing is left, and the service goes on."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.server import Server, running_server
from tests.support.tiny import make_tiny_llama

pytestmark = pytest.mark.slow

NUM_CLIENTS = 200
LONG = {"prompt": "the", "max_tokens": 10_000, "ignore_eos": True, "temperature": 0}
LONG_CHAT = {"messages": [{"role": "user", "content": "a"}], "max_completion_tokens": 10_000, "ignore_eos": True}
SHORT = {"prompt": "the thing is", "max_tokens": 24, "ignore_eos": True, "temperature": 0}
KEY = "sk-storm"
PATIENCE_S = 60
GAUGES = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")


@pytest.fixture(scope="module")
def long_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("storm")
    make_tiny_llama(home / "models" / "tiny", max_position_embeddings=16_384)
    return home


def start(home: Path, max_num_seqs: int) -> Any:
    words = ("model=tiny", "device=cpu", "dtype=fp32", "num_threads=1", f"api_keys={KEY}", "kv_cache_memory=1GiB")
    return running_server(home, *words, f"max_num_seqs={max_num_seqs}")


@asynccontextmanager
async def client_of(server: Server) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=None)
    headers = {"Authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=PATIENCE_S, limits=limits) as client:
        yield client


async def metric(client: httpx.AsyncClient, name: str, **labels: str) -> float:
    """The sum over all series with these labels."""
    text = (await client.get("/metrics")).text
    series = re.findall(rf"^{name}(?:{{(.*)}})? (\S+)$", text, re.MULTILINE)
    assert series, name
    wanted = [f'{label}="{value}"' for label, value in labels.items()]
    return sum(float(value) for found, value in series if all(label in found.split(",") for label in wanted))


async def until(holds: Callable[[], Coroutine[Any, Any, bool]]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not await holds():
            await asyncio.sleep(0.02)


async def stay(client: httpx.AsyncClient, number: int) -> None:
    """Ask, and wait: every other client for a stream."""
    if number % 2:
        assert (await client.post("/v1/completions", json=LONG)).status_code == 200
        return
    async with client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as answer:
        assert answer.status_code == 200
        async for _ in answer.aiter_bytes():
            pass


async def short_answer(client: httpx.AsyncClient) -> str:
    answer = await client.post("/v1/completions", json=SHORT)
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["text"]
    return text


@pytest.mark.parametrize(("max_num_seqs", "where"), [(256, "in the batch"), (4, "in the queue")])
def test_clients_that_hang_up_leave_nothing_behind(
    long_home: Path, max_num_seqs: int, where: str, figure: Callable[[str, object], None]
) -> None:
    async def storm(server: Server) -> None:
        async with client_of(server) as client:
            expected = await short_answer(client)
            clients = [asyncio.create_task(stay(client, number)) for number in range(NUM_CLIENTS)]

            async def all_are_there() -> bool:
                under_way = [await metric(client, name) for name in GAUGES[:2]]
                assert not [task for task in clients if task.done()]
                return sum(under_way) == NUM_CLIENTS

            await until(all_are_there)
            await asyncio.sleep(0.5)
            running = await metric(client, GAUGES[0])
            assert running == min(NUM_CLIENTS, max_num_seqs)
            for task in clients:
                task.cancel()
            await asyncio.gather(*clients, return_exceptions=True)
            hung_up = time.monotonic()
            assert await short_answer(client) == expected
            figure(f"{NUM_CLIENTS} clients hang up, {where}: next answer after", f"{time.monotonic() - hung_up:.2f} s")

            async def all_are_gone() -> bool:
                return not any([await metric(client, name) for name in GAUGES])

            await until(all_are_gone)
            figure(
                f"{NUM_CLIENTS} clients hang up, {where}: all gauges at 0 after", f"{time.monotonic() - hung_up:.2f} s"
            )
            assert await metric(client, "tuneserve:requests_aborted_total", cause="client") == NUM_CLIENTS
            assert await metric(client, "tuneserve:requests_aborted_total") == NUM_CLIENTS
            assert await metric(client, "vllm:request_success_total", finished_reason="abort") == NUM_CLIENTS
            assert await short_answer(client) == expected

    with start(long_home, max_num_seqs) as server:
        asyncio.run(storm(server))
        assert server.stop() == 0
    assert not [line for line in server.log if "ERROR" in line or "Traceback" in line]


def test_an_engine_killed_under_load_fails_every_request_at_once_and_comes_back(
    long_home: Path, figure: Callable[[str, object], None]
) -> None:
    num_requests = 50

    async def ask(client: httpx.AsyncClient, number: int, killed: asyncio.Future[float]) -> float:
        """Seconds from the kill to the whole answer: an error, which in a stream that had begun is its last event."""
        if number % 2:
            answer = await client.post("/v1/chat/completions", json=LONG_CHAT)
        else:
            answer = await client.post("/v1/completions", json={**LONG, "stream": True})
        if answer.status_code == 200:
            *_, last, done, rest = answer.text.split("\n\n")
            assert (number % 2, done, rest) == (0, "data: [DONE]", "")
            error = json.loads(last.removeprefix("data: "))["error"]
        else:
            assert (answer.status_code, "retry-after" in answer.headers) == (503, True)
            error = answer.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["type"] == "unavailable_error"
        return time.monotonic() - await killed

    async def kill(server: Server, engine: int) -> None:
        async with client_of(server) as client:
            expected = await short_answer(client)
            killed: asyncio.Future[float] = asyncio.get_running_loop().create_future()
            asks = [asyncio.create_task(ask(client, number, killed)) for number in range(num_requests)]

            async def all_are_there() -> bool:
                return await metric(client, GAUGES[0]) + await metric(client, GAUGES[1]) == num_requests

            await until(all_are_there)
            os.kill(engine, signal.SIGKILL)
            killed.set_result(time.monotonic())
            seconds = max(await asyncio.gather(*asks))
            figure(f"{num_requests} requests fail after the engine was killed, the last one after", f"{seconds:.2f} s")
            assert seconds < 2
            assert (await client.get("/ready")).status_code == 503
            assert not any([await metric(client, name) for name in GAUGES])
            assert await metric(client, "tuneserve:requests_aborted_total", cause="engine") == num_requests

            async def is_ready() -> bool:
                return (await client.get("/ready")).status_code == 200

            await until(is_ready)
            figure("the engine is ready again after", f"{time.monotonic() - await killed:.2f} s")
            assert await short_answer(client) == expected

    with start(long_home, max_num_seqs=16) as server:
        pid = server.process.pid
        (engine,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        asyncio.run(kill(server, int(engine)))
        assert server.stop() == 0

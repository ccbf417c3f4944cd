"""The client against real engine processes."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from service.engine.messages import EngineConfig, EngineReady, LoadModel, StepStats
from service.engine_client import (
    EngineClient,
    EngineUnavailable,
    ModelLoadError,
    ModelUnavailable,
    RequestRejected,
)
from tests.support.engines import MODEL, Driver, request, tiny_engine_config
from tests.support.tiny import make_tiny_llama
from tests.support.token_stream import TokenStream

PROMPT = [9, 8, 7, 6]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny") / "a", seed=0)


@pytest.fixture(scope="module")
def other_tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny") / "b", seed=1)


@asynccontextmanager
async def running(config: EngineConfig) -> AsyncIterator[tuple[EngineClient, list[StepStats]]]:
    """A client whose engine has loaded its base model as `m`, now and after each restart."""
    stats: list[StepStats] = []

    async def load(ready: EngineReady) -> None:
        await client.load_model(LoadModel(model_id=MODEL, base_dir=config.base_dir))

    client = EngineClient(config, on_ready=load, on_stats=stats.append)
    await client.start()
    try:
        yield client, stats
    finally:
        await client.stop()


async def collect(stream: TokenStream) -> list[int]:
    return await stream.tokens()


async def until(is_over: Callable[[], bool], timeout_s: float = 30) -> None:
    async with asyncio.timeout(timeout_s):
        while not is_over():
            await asyncio.sleep(0.01)


def test_requests_loads_and_aborts_go_through_the_process(tiny: Path, other_tiny: Path, tmp_path: Path) -> None:
    driver = Driver(tiny_engine_config(tiny))
    driver.load(tiny)
    driver.load(other_tiny, "new")
    expected = {name: driver.generate(PROMPT, name) for name in (MODEL, "new")}

    async def check() -> None:
        async with running(tiny_engine_config(tiny, max_num_seqs=3)) as (client, stats):
            assert client.state == "ready"
            assert client.ready is not None
            assert client.ready.device == "cpu"
            await check_batch(client)
            await check_failures(client)
            await check_aborts(client, stats)
            await check_swap(client)

    async def check_batch(client: EngineClient) -> None:
        streams = [TokenStream(client, request(str(index), PROMPT)) for index in range(10)]
        assert await asyncio.gather(*map(collect, streams)) == [expected[MODEL]] * 10

    async def check_failures(client: EngineClient) -> None:
        with pytest.raises(RequestRejected, match="prompt: it is empty"):
            await collect(TokenStream(client, request("a", [])))
        with pytest.raises(ModelUnavailable, match="'none' is not loaded"):
            await collect(TokenStream(client, request("a", PROMPT, "none")))
        with pytest.raises(ModelLoadError, match="there is no model folder"):
            await client.load_model(LoadModel(model_id="x", base_dir=str(tmp_path / "x"), replaces=MODEL))
        assert await collect(TokenStream(client, request("a", PROMPT))) == expected[MODEL]

    async def check_aborts(client: EngineClient, stats: list[StepStats]) -> None:
        for end in (abandon, abort, cancel):
            await end(TokenStream(client, request(end.__name__, PROMPT, max_tokens=200)))
            await until(lambda: stats[-1].num_running == stats[-1].used_blocks == 0)

    async def check_swap(client: EngineClient) -> None:
        command = LoadModel(model_id="new", base_dir=str(other_tiny), replaces=MODEL)
        other = asyncio.create_task(client.load_model(command))
        loaded = await client.load_model(command)
        last = TokenStream(client, request("last", PROMPT))  # no await since: the old weights are still there
        assert await collect(last) == expected[MODEL]
        assert await other == loaded
        await client.unload_model(MODEL)
        with pytest.raises(ModelUnavailable):
            await collect(TokenStream(client, request("a", PROMPT)))
        assert await collect(TokenStream(client, request("b", PROMPT, "new"))) == expected["new"]

    asyncio.run(check())


async def abandon(stream: TokenStream) -> None:
    assert (await anext(stream)).finish_reason is None
    stream.abandon()
    await asyncio.sleep(0.1)
    assert stream._items.empty()


async def abort(stream: TokenStream) -> None:
    await anext(stream)
    stream.abort()
    *_, last = [output async for output in stream]
    assert last.finish_reason == "abort"
    assert last.timing is not None
    assert last.timing.decode_tokens < 199


async def cancel(stream: TokenStream) -> None:
    task = asyncio.create_task(collect(stream))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("swap", ["overlap", "drain"])
def test_swaps_under_load_lose_no_request(tiny: Path, other_tiny: Path, swap: str) -> None:
    folders = {MODEL: tiny, "new": other_tiny}
    driver = Driver(tiny_engine_config(tiny))
    for name, folder in folders.items():
        driver.load(folder, name)
    expected = {name: driver.generate(PROMPT, name, max_tokens=40) for name in folders}
    served, is_over, answered = MODEL, False, Counter[str]()

    def has_answered(count: int) -> bool:
        return answered.total() >= count

    async def ask(client: EngineClient, number: int) -> None:
        count = 0
        while not is_over:
            count, model = count + 1, served
            try:
                tokens = await collect(TokenStream(client, request(f"{number}-{count}", PROMPT, model, max_tokens=40)))
            except ModelUnavailable:
                continue  # as the service does: it asks again what is served
            assert tokens == expected[model]
            answered[model] += 1

    async def check() -> None:
        nonlocal served, is_over
        async with running(tiny_engine_config(tiny, swap=swap, max_num_seqs=3)) as (client, _):
            clients = [asyncio.create_task(ask(client, number)) for number in range(6)]
            for name in ["new", MODEL] * 3:
                await until(partial(has_answered, answered.total() + 4))
                command = LoadModel(model_id=name, base_dir=str(folders[name]), replaces=served)
                assert (await client.load_model(command)).mode == swap
                served = name
            is_over = True
            await asyncio.gather(*clients)

    asyncio.run(check())
    assert set(answered) == set(folders)


def test_a_killed_engine_fails_what_runs_at_once_and_comes_back(tiny: Path) -> None:
    async def check() -> None:
        async with running(tiny_engine_config(tiny)) as (client, _):
            whole = await collect(TokenStream(client, request("before", PROMPT)))
            streams = [TokenStream(client, request(str(index), PROMPT, max_tokens=250)) for index in range(5)]
            await anext(streams[0])
            assert client.pid is not None
            os.kill(client.pid, signal.SIGKILL)
            killed = time.monotonic()
            results = await asyncio.gather(*map(collect, streams), return_exceptions=True)
            assert time.monotonic() - killed < 2
            assert [type(result) for result in results] == [EngineUnavailable] * 5
            assert "signal 9 (SIGKILL)" in str(results[0])
            assert client.state == "dead"
            with pytest.raises(EngineUnavailable, match="the engine is dead"):
                TokenStream(client, request("dead", PROMPT))
            with pytest.raises(EngineUnavailable):
                await client.load_model(LoadModel(model_id="x", base_dir=str(tiny)))
            await until(lambda: client.state == "ready")
            assert (client.restarts, client.failure) == (1, None)
            assert await answered(client) == whole

    async def answered(client: EngineClient) -> list[int]:
        while True:  # `on_ready` loads the weights anew
            try:
                return await collect(TokenStream(client, request("after", PROMPT)))
            except ModelUnavailable:
                await asyncio.sleep(0.01)

    asyncio.run(check())


def test_an_engine_that_is_killed_while_it_starts_is_started_again(tiny: Path) -> None:
    async def check() -> None:
        client = EngineClient(tiny_engine_config(tiny), on_ready=greet, on_stats=lambda stats: None)
        start = asyncio.create_task(client.start())
        await until(lambda: client.pid is not None)
        assert client.pid is not None
        os.kill(client.pid, signal.SIGKILL)
        await start
        assert client.state == "dead"
        await until(lambda: client.state == "ready", 60)
        assert client.restarts == 1
        await client.stop()

    async def greet(ready: EngineReady) -> None:
        return

    asyncio.run(check())


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"base_dir": "/nowhere"}, "there is no model folder /nowhere"),
        ({"device": "cuda:7"}, "device: 'cuda:7' cannot be used"),
        ({"kv_cache_bytes": 1}, "kv_cache_memory: 0 bytes hold 0 tokens"),
    ],
)
def test_an_engine_that_cannot_start_stays_dead_and_says_why(
    tiny: Path, overrides: dict[str, Any], reason: str
) -> None:
    async def check() -> None:
        fields = {**{name: getattr(config, name) for name in config.__struct_fields__}, **overrides}
        async with running(EngineConfig(**fields)) as (client, _):
            assert client.state == "dead"
            assert client.failure is not None
            assert reason in client.failure
            await asyncio.sleep(1)
            assert client.restarts == 0
            with pytest.raises(EngineUnavailable, match=r"^the engine is dead$"):  # clients get no log lines
                TokenStream(client, request("a", PROMPT))

    config = tiny_engine_config(tiny)
    asyncio.run(check())


def test_ctrl_c_is_left_to_the_parent_and_stopping_answers_what_runs(tiny: Path) -> None:
    async def check() -> None:
        async with running(tiny_engine_config(tiny)) as (client, _):
            stream = TokenStream(client, request("a", PROMPT, max_tokens=250))
            await anext(stream)
            pid = client.pid
            assert pid is not None
            os.kill(pid, signal.SIGINT)
            await anext(stream)
            await client.stop()
            outputs = [output async for output in stream]
            assert outputs[-1].finish_reason == "abort"
            assert client.state == "stopped"
            with pytest.raises(EngineUnavailable, match="the engine is stopped"):
                TokenStream(client, request("b", PROMPT))
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)

    asyncio.run(check())


def test_an_idle_engine_uses_no_processor_and_ends_with_its_parent(tiny: Path) -> None:
    async def check() -> None:
        async with running(tiny_engine_config(tiny)) as (client, _):
            assert client.pid is not None
            await asyncio.sleep(0.2)
            before = processor_seconds(client.pid)
            await asyncio.sleep(1.0)
            assert processor_seconds(client.pid) - before < 0.05
            process = client._process
            assert process is not None
            process._connection.close()  # what the kernel does when the parent dies
            await until(lambda: client._process is None or client._process.pid != process.pid, 5)
            assert "exit code 0" in str(client.failure)

    asyncio.run(check())


def processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_an_engine_that_sleeps_is_a_process_less_and_comes_back_with_its_weights(tiny: Path) -> None:
    async def check() -> None:
        async with running(tiny_engine_config(tiny)) as (client, _):
            expected = await collect(TokenStream(client, request("a", PROMPT)))
            first, known = client.pid, client.known
            cut_off = TokenStream(client, request("long", PROMPT, max_tokens=200))
            assert client.num_open == 1
            await client.sleep()
            assert (client.state, client.pid, client.num_open) == ("asleep", None, 0)
            assert (client.ready, client.known) == (None, known)
            assert len(await collect(cut_off)) < 200
            with pytest.raises(EngineUnavailable, match="asleep"):
                TokenStream(client, request("b", PROMPT))
            await client.start()
            assert (client.state, client.restarts) == ("ready", 0)
            assert client.pid not in (None, first)
            assert await collect(TokenStream(client, request("c", PROMPT))) == expected
        await client.start()
        assert client.pid is None  # for good

    asyncio.run(check())

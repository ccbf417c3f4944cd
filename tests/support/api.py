"""The whole API in front of a scripted engine, called in this process and without a socket."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import httpx
from fastapi import FastAPI

from service.app import create_app
from service.services import Services, running_services
from service.settings import Settings
from tests.support.scripted_engine import ScriptedEngine, write_model_without_weights

BASE = "base"
ResultT = TypeVar("ResultT")


class Api:
    """Synchronous calls into an application that lives on an event loop of its own."""

    def __init__(self, app: FastAPI, loop: asyncio.AbstractEventLoop) -> None:
        self.app = app
        self._loop = loop
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        self.async_client = httpx.AsyncClient(transport=transport, base_url="http://test")

    @property
    def services(self) -> Services:
        services: Services = self.app.state.services
        return services

    @property
    def engine(self) -> ScriptedEngine:
        engine = self.services.engine
        assert isinstance(engine, ScriptedEngine)
        return engine

    def run(self, work: Coroutine[Any, Any, ResultT], timeout: float = 20) -> ResultT:
        return self.start(work).result(timeout)

    def start(self, work: Coroutine[Any, Any, ResultT]) -> Future[ResultT]:
        """`run` without waiting."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.run(self.async_client.get(path, **options))

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        """`body` is sent as JSON; `content=` sends bytes as they are."""
        return self.run(self.async_client.post(path, **({"json": body} if body is not None else {}), **options))

    def events(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """The data of a stream, whose end is checked and left out."""
        answer = self.post(path, {**body, "stream": True})
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"].startswith("text/event-stream")
        *events, done, rest = answer.text.split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        return [json.loads(item.removeprefix("data: ")) for item in events]

    def says(self, text: str) -> None:
        """Let the engine answer with the tokens of `text` from now on."""
        tokenizer = self.services.codec.tokenizer
        self.engine.answer = tuple(tokenizer.encode(text, add_special_tokens=False))
        self.engine.eos = tokenizer.eos_token_ids[0]

    def metric(self, name: str, **labels: str) -> float:
        """The value of a metric on /metrics."""
        self.get("/metrics")
        value = self.services.metrics.registry.get_sample_value(name, labels or None)
        assert value is not None, name
        return value


@contextmanager
def running_api(home: Path, **settings: Any) -> Iterator[Api]:
    """A base model named `base`, answered by a ScriptedEngine."""
    if not (home / "models" / BASE).exists():
        write_model_without_weights(home / "models" / BASE)
    app = create_app(
        Settings(home=home, model=BASE, **settings), compose=partial(running_services, engine_type=ScriptedEngine)
    )
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    api = Api(app, loop)
    lifespan = app.router.lifespan_context(app)
    try:
        api.run(lifespan.__aenter__())
        api.run(_finish(api.services.startup))
        api.says("Hello there.")
        yield api
        api.run(lifespan.__aexit__(None, None, None))
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _finish(task: asyncio.Task[None]) -> None:
    await task

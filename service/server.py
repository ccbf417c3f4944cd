"""The service as a process: uvicorn with our way to start and to stop. Blocks until it is asked to stop.

Stopping (SIGTERM, Ctrl-C): new requests get 503; running ones may go on for `drain_seconds`, and end with `abort`
after that; then jobs and the engine are stopped, and no child process is left. A second signal skips the waiting.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import resource
import socket
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from types import FrameType
from typing import Any, TypeVar

import uvicorn
from starlette.types import ASGIApp

from lm.errors import UserError
from service.app import create_app
from service.services import Services, running_services
from service.settings import Settings

logger = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")

LAST_BYTES_S = 3
"""How long connections may take to close once nothing is generated any more."""
OPEN_FILES = 65_536


def serve(settings: Settings) -> int:
    """Run the service; the exit code. Prints one line with the URL when it is ready, and logs through `logging`.

    Raises UserError for a model, a home or an address that cannot be used.
    """
    _allow_many_connections()
    with listen(settings.host, settings.port) as listener:
        return run_until_done(_serve(settings, listener))


def run_until_done(work: Coroutine[Any, Any, ResultT]) -> ResultT:
    """On the event loop that the service runs on."""
    return asyncio.run(work)


def uvicorn_config(app: ASGIApp) -> uvicorn.Config:
    """As the service runs under uvicorn."""
    return uvicorn.Config(
        app,
        lifespan="on",
        ws="none",  # there are none here, and each attempt would be a warning in the log
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=LAST_BYTES_S,
    )


def _allow_many_connections() -> None:
    """Shells allow 1024 open files by default; beyond them no connection is accepted and no process started."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def listen(host: str, port: int) -> socket.socket:
    """Raises UserError for an address that cannot be used."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise UserError(
            f"host, port: cannot listen on {host} port {port}: {error.strerror}; choose others, such as port=0 for a "
            "free one",
            param="port",
        ) from error
    # Connections inherit it. asyncio sets it only where a socket names its protocol, which create_server does not; without
    # it the body of an answer waits 40 ms for the client to acknowledge the headers.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


async def _serve(settings: Settings, listener: socket.socket) -> int:
    async with running_services(settings) as services:
        server = _Server(settings, services, _url(listener))
        gc.freeze()  # what is there now stays: to look for garbage in it costs a fifth of the time for a token
        await server.serve(sockets=[listener])
    return 1 if server.failed else 0


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Server(uvicorn.Server):
    def __init__(self, settings: Settings, services: Services, url: str) -> None:
        @asynccontextmanager
        async def running(settings: Settings) -> AsyncIterator[Services]:
            yield services

        super().__init__(uvicorn_config(create_app(settings, compose=running)))
        self.failed = False
        """Whether it never came to serve anything."""
        self._services = services
        self._url = url
        self._drain_seconds = settings.drain_seconds
        self._is_announced = False
        self._drain_until: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins to drain, a second one ends it."""
        self._drain_until = time.monotonic() + (0 if self._services.admission.draining else self._drain_seconds)
        self._services.admission.draining = True

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; true ends the main loop."""
        if self._drain_until is not None:
            return await self._drained(self._drain_until)
        if not self._is_announced and self._services.is_ready:
            self._is_announced = True
            print(f"TuneServe is ready at {self._url} and serves {self._services.settings.model_name}", flush=True)
        elif not self._is_announced and self._services.is_asleep:
            self._is_announced = True
            print(f"TuneServe is at {self._url} and not ready: {self._services.serving.gate.reason}", flush=True)
        elif not self._is_announced and (reason := self._services.failure) is not None:
            self.failed = True
            logger.error("the service cannot start: %s", reason.splitlines()[0])
            return True
        return await super().on_tick(counter)

    async def _drained(self, until: float) -> bool:
        await self._services.sleep.close()
        if self._services.admission.active and time.monotonic() < until:
            return False
        self._services.store.release_followers()
        await self._services.engine.stop()
        return True

"""Streamed tokens per second through the whole HTTP stack on one core, beside a bare Starlette app on the same core.

The service is the real command; its engine is a process that answers with the tokens of the prompt
(tests/support/echo_engine.py). The bare app streams the very bytes that the service sent, under the same event loop and
uvicorn settings, one event a write. In each round one side is measured after the other; client and engine have the other
core. Two tables:

runs ahead     The engine makes steps as fast as they are read. The bare app sends without waiting for anything.
in lockstep    The engine makes a step when the one before has been read, so that every step is a wake-up and every token a
               write. The bare app yields to the event loop before each event, as an app that waits for a token does.

Beside tokens per second there is the processor's time per token, which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import select
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from service.server import listen, run_until_done, uvicorn_config
from tests.support.echo_engine import CORE, LOCKSTEP
from tests.support.scripted_engine import write_model_without_weights
from tests.support.server import running_server

SERVER_CORE, CLIENT_CORE = 0, 1
STREAMS = (1, 16, 64, 256)
TOKENS = 60_000
"""Of all streams of one measurement together."""
ROUNDS = 5
TEXT = "The quick brown fox jumps over the lazy dog, and 12 more; 你好. "
END = b"0\r\n\r\n"
PAUSE_S = 0.001
"""Between two looks at the sockets, so that the client reads much at once and leaves its core to the engine."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    name: str
    path: str
    body: dict[str, Any]


ENDPOINTS = (
    Endpoint("completions", "/v1/completions", {"prompt": TEXT}),
    Endpoint("chat", "/v1/chat/completions", {"messages": [{"role": "user", "content": TEXT}]}),
)


@dataclass(frozen=True, slots=True)
class Side:
    url: str
    pid: int

    def processor_seconds(self) -> float:
        """Of its main thread."""
        return int(Path(f"/proc/{self.pid}/schedstat").read_text().split()[0]) / 1e9


# ---- the client


def measure(side: Side, path: str, body: bytes, num_streams: int) -> tuple[float, float, list[bytes]]:
    """Seconds until the last stream has ended, those that the server computed, and what each stream brought."""
    parts = urlsplit(side.url)
    head = f"POST {path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\nX-Request-Id: bench\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    with contextlib.ExitStack() as stack:
        address = (parts.hostname, parts.port)
        sockets = [stack.enter_context(socket.create_connection(address)) for _ in range(num_streams)]
        begin, worked = time.perf_counter(), side.processor_seconds()
        for sock in sockets:
            sock.sendall(request)
        received = _read_all(sockets)
        return time.perf_counter() - begin, side.processor_seconds() - worked, received


def _read_all(sockets: list[socket.socket]) -> list[bytes]:
    poll = select.epoll()
    parts: dict[int, list[bytes]] = {}
    by_fd = {sock.fileno(): sock for sock in sockets}
    for fd in by_fd:
        poll.register(fd, select.EPOLLIN)
        parts[fd] = []
    open_fds = set(by_fd)
    while open_fds:
        for fd, _ in poll.poll():
            data = by_fd[fd].recv(1 << 20)
            parts[fd].append(data)
            if not data or data.endswith(END) or (len(data) < len(END) and b"".join(parts[fd][-2:]).endswith(END)):
                open_fds.discard(fd)
                poll.unregister(fd)
        time.sleep(PAUSE_S)
    poll.close()
    return [b"".join(parts[fd]) for fd in by_fd]


def content(raw: bytes) -> tuple[bytes, int]:
    """The body of a chunked answer, and in how many chunks it came."""
    head, _, rest = raw.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), raw[:500]
    body, start, num_chunks = [], 0, 0
    while True:
        end = rest.index(b"\r\n", start)
        size = int(rest[start:end], 16)
        if size == 0:
            return b"".join(body), num_chunks
        body.append(rest[end + 2 : end + 2 + size])
        start, num_chunks = end + 4 + size, num_chunks + 1


# ---- the two sides


@contextlib.contextmanager
def service(home: Path, *, lockstep: bool) -> Iterator[Side]:
    os.environ[CORE] = str(CLIENT_CORE)
    os.environ.pop(LOCKSTEP, None)
    if lockstep:
        os.environ[LOCKSTEP] = "1"
    command = ("taskset", "-c", str(SERVER_CORE), sys.executable, "-m", "tests.support.echo_server")
    with running_server(home, "model=base", "max_num_seqs=512", command=command) as server:
        yield Side(server.url, server.process.pid)


@contextlib.contextmanager
def bare_app(folder: Path) -> Iterator[Side]:
    command = ("taskset", "-c", str(SERVER_CORE), sys.executable, __file__, "--bare", str(folder))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield Side(process.stdout.readline().strip(), process.pid)
    finally:
        process.terminate()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def serve_bare(folder: Path) -> None:
    """POST /NAME streams the events in the file NAME; POST /NAME?yield=1 yields to the event loop before each."""
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import StreamingResponse
    from starlette.routing import Route

    events = {path.name: re.findall(rb".*?\n\n", path.read_bytes(), re.DOTALL) for path in folder.iterdir()}

    async def stream(request: Request) -> StreamingResponse:
        await request.json()
        yields = "yield" in request.query_params

        async def body() -> Any:
            for event in events[request.path_params["name"]]:
                if yields:
                    await asyncio.sleep(0)
                yield event

        return StreamingResponse(body(), media_type="text/event-stream")

    app = Starlette(routes=[Route("/{name}", stream, methods=["POST"])])
    with listen("127.0.0.1", 0) as listener:
        print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
        run_until_done(uvicorn.Server(uvicorn_config(app)).serve(sockets=[listener]))


# ---- the table


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--bare", type=Path)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--streams", type=int, nargs="*", default=STREAMS)
    arguments = parser.parse_args()
    if arguments.bare is not None:
        serve_bare(arguments.bare)
        return
    os.sched_setaffinity(0, {CLIENT_CORE})
    with tempfile.TemporaryDirectory() as folder:
        home, recorded = Path(folder) / "home", Path(folder) / "recorded"
        write_model_without_weights(home / "models" / "base")
        recorded.mkdir()
        for lockstep in (False, True):
            table(home, recorded, arguments, lockstep=lockstep)


def table(home: Path, recorded: Path, arguments: argparse.Namespace, *, lockstep: bool) -> None:
    print(f"\nThe engine {'goes in lockstep' if lockstep else 'runs ahead'}; {versions()}")
    print(
        f"{'':20} {'tokens/s':>9} {'bare':>9} {'ratio':>6} {'us/token':>12} {'bare':>9} {'ratio':>6} {'events/write':>12}"
    )
    with service(home, lockstep=lockstep) as ours:
        record(ours.url, recorded, arguments.streams)
        with bare_app(recorded) as bare:
            for endpoint in ENDPOINTS:
                for num_streams in arguments.streams:
                    name = f"{endpoint.name}-{num_streams}"
                    path = f"/{name}?yield=1" if lockstep else f"/{name}"
                    times = measure_rounds(endpoint, num_streams, (ours, bare), path, recorded / name, arguments.rounds)
                    print_row(endpoint, num_streams, times)


def body_for(endpoint: Endpoint, num_streams: int) -> bytes:
    return json.dumps({**endpoint.body, "max_tokens": TOKENS // num_streams, "stream": True}).encode()


def record(url: str, folder: Path, streams: tuple[int, ...]) -> None:
    """What the service answers to each kind of request, for the bare app to answer with."""
    for endpoint in ENDPOINTS:
        for num_streams in streams:
            answer = httpx.post(
                f"{url}{endpoint.path}",
                content=body_for(endpoint, num_streams),
                timeout=60,
                headers={"Content-Type": "application/json", "X-Request-Id": "bench"},
            )
            (folder / f"{endpoint.name}-{num_streams}").write_bytes(answer.content)


@dataclass(frozen=True, slots=True)
class Times:
    """Of one round, in seconds."""

    wall: float
    bare_wall: float
    processor: float
    bare_processor: float
    events_per_write: float


def measure_rounds(
    endpoint: Endpoint, num_streams: int, sides: tuple[Side, Side], bare_path: str, recorded: Path, rounds: int
) -> list[Times]:
    whole, body = recorded.read_bytes(), body_for(endpoint, num_streams)
    ours, bare = sides
    num_events = whole.count(b"\n\n") * num_streams
    times = []
    for _ in range(rounds):
        wall, processor, answers = measure(ours, endpoint.path, body, num_streams)
        num_writes = check(answers, whole)
        bare_wall, bare_processor, answers = measure(bare, bare_path, body, num_streams)
        check(answers, whole)
        times.append(Times(wall, bare_wall, processor, bare_processor, num_events / num_writes))
    return times


def print_row(endpoint: Endpoint, num_streams: int, times: list[Times]) -> None:
    tokens = TOKENS // num_streams * num_streams

    def middle(figure: Callable[[Times], float]) -> float:
        return statistics.median(map(figure, times))

    print(
        f"{endpoint.name:12} {num_streams:7}"
        f" {tokens / middle(lambda t: t.wall):9.0f} {tokens / middle(lambda t: t.bare_wall):9.0f}"
        f" {middle(lambda t: t.bare_wall / t.wall):6.2f}"
        f" {middle(lambda t: t.processor) / tokens * 1e6:12.1f} {middle(lambda t: t.bare_processor) / tokens * 1e6:9.1f}"
        f" {middle(lambda t: t.bare_processor / t.processor):6.2f} {middle(lambda t: t.events_per_write):12.1f}",
        flush=True,
    )


def versions() -> str:
    names = ("uvicorn", "starlette", "h11", "httptools", "uvloop")
    return ", ".join(f"{name} {version(name)}" for name in names if find_spec(name) is not None)


def check(answers: list[bytes], whole: bytes) -> int:
    """The number of writes that they came in."""
    contents = [content(answer) for answer in answers]
    assert all(len(data) == len(whole) for data, _ in contents)
    return sum(num_chunks for _, num_chunks in contents)


if __name__ == "__main__":
    main()

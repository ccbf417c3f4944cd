"""`make bench-http`: streamed tokens per second through the whole HTTP stack, beside a bare Starlette app, on one core.

The service is the real command; its engine is a process that answers with the tokens of the prompt as fast as they are
read (tests/support/echo_engine.py). The bare app streams the very bytes that the service sent, under the same event
loop and uvicorn settings, one event a write and without waiting for anything. Both run on core 0, one after the other in each round; the
client and the engine share core 1. Two engines are measured: one that runs ahead, as far as the socket's buffer goes,
and one that makes a step only when the one before has been read, so that every token is a wake-up.
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
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from service.server import run_until_done, uvicorn_config
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
    """POST /NAME streams the events in the file NAME."""
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import StreamingResponse
    from starlette.routing import Route

    turns = "TURNS" in os.environ
    events = {path.name: re.findall(rb".*?\n\n", path.read_bytes(), re.DOTALL) for path in folder.iterdir()}

    async def stream(request: Request) -> StreamingResponse:
        await request.json()

        async def body() -> Any:
            for event in events[request.path_params["name"]]:
                yield event
                if turns:
                    await asyncio.sleep(0)

        return StreamingResponse(body(), media_type="text/event-stream")

    app = Starlette(routes=[Route("/{name}", stream, methods=["POST"])])
    with socket.create_server(("127.0.0.1", 0), backlog=2048) as listener:
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
        for lockstep in (True, False):
            table(home, recorded, arguments, lockstep=lockstep)


def table(home: Path, recorded: Path, arguments: argparse.Namespace, *, lockstep: bool) -> None:
    print(f"\nengine {'in lockstep' if lockstep else 'runs ahead'}; uvicorn {version('uvicorn')}")
    print(
        f"{'':20} {'tokens/s':>9} {'bare':>9} {'ratio':>6} {'us/token':>12} {'bare':>9} {'ratio':>6} {'events/write':>12}"
    )
    with service(home, lockstep=lockstep) as ours:
        record(ours.url, recorded, arguments.streams)
        with bare_app(recorded) as bare:
            for endpoint in ENDPOINTS:
                for num_streams in arguments.streams:
                    row(endpoint, num_streams, ours, bare, recorded, arguments.rounds)


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


def row(endpoint: Endpoint, num_streams: int, ours: Side, bare: Side, recorded: Path, rounds: int) -> None:
    name = f"{endpoint.name}-{num_streams}"
    whole = (recorded / name).read_bytes()
    body = body_for(endpoint, num_streams)
    times: list[tuple[float, ...]] = []
    for _ in range(rounds):
        seconds, worked, answers = measure(ours, endpoint.path, body, num_streams)
        chunks = check(answers, whole)
        bare_seconds, bare_worked, answers = measure(bare, f"/{name}", body, num_streams)
        check(answers, whole)
        times.append((seconds, bare_seconds, bare_seconds / seconds, worked, bare_worked, bare_worked / worked))
    wall, bare_wall, ratio, cpu, bare_cpu, cpu_ratio = (
        statistics.median(column) for column in zip(*times, strict=True)
    )
    tokens = TOKENS // num_streams * num_streams
    per_write = whole.count(b"\n\n") * num_streams / chunks
    print(
        f"{endpoint.name:12} {num_streams:7} {tokens / wall:9.0f} {tokens / bare_wall:9.0f} {ratio:6.2f}"
        f" {cpu / tokens * 1e6:12.1f} {bare_cpu / tokens * 1e6:9.1f} {cpu_ratio:6.2f} {per_write:12.1f}",
        flush=True,
    )


def check(answers: list[bytes], whole: bytes) -> int:
    """The number of writes that they came in."""
    contents = [content(answer) for answer in answers]
    assert all(len(data) == len(whole) for data, _ in contents)
    return sum(num_chunks for _, num_chunks in contents)


if __name__ == "__main__":
    main()

"""The real command over real sockets, in front of an engine process without a model; and clients that hang up."""

from __future__ import annotations

import json
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.support.echo_engine import STEP_S
from tests.support.scripted_engine import write_model_without_weights
from tests.support.server import Server, running_server

COMMAND = (sys.executable, "-m", "tests.support.echo_server")


@contextmanager
def running_echo_service(home: Path, *settings: str, step_s: float = 0.005) -> Iterator[Server]:
    write_model_without_weights(home / "models" / "base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(STEP_S, str(step_s))
        with running_server(home, "model=base", *settings, command=COMMAND) as server:
            yield server


def engine_pid(server: Server) -> int:
    (pid,) = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    return int(pid)


def send(server: Server, path: str, body: dict[str, Any], **headers: str) -> socket.socket:
    """A connection on which the request has been sent, and nothing been read."""
    parts = urlsplit(server.url)
    data = json.dumps(body).encode()
    lines = {"Host": parts.netloc, "Content-Type": "application/json", "Content-Length": str(len(data)), **headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    connection = socket.create_connection((parts.hostname, parts.port), timeout=30)
    connection.sendall(f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + data)
    return connection


def metric(server: Server, name: str, **labels: str) -> float:
    """The sum of the samples that have these labels."""
    text = httpx.get(f"{server.url}/metrics", timeout=30).text
    found = re.findall(rf"^{re.escape(name)}(?:{{(.*)}})? (\S+)$", text, re.MULTILINE)
    wanted = [f'{label}="{value}"' for label, value in labels.items()]
    return sum(float(value) for given, value in found if all(item in given for item in wanted))


def until(is_so: Callable[[], bool], timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)

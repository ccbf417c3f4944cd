"""A real `tuneserve serve` process on a free port, for tests that go through HTTP."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

TUNESERVE = (sys.executable, "-m", "service.cli")
URL = re.compile(r"http://[\w.:\[\]]+")


@dataclass
class Server:
    process: subprocess.Popen[str]
    url: str
    log: list[str] = field(default_factory=list)

    def stop(self, timeout: float = 30) -> int:
        """Ctrl-C, as a person would; the exit code."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(timeout)


@contextmanager
def running_server(
    home: Path, *arguments: str, timeout: float = 120, command: Sequence[str] = TUNESERVE, cwd: Path | None = None
) -> Iterator[Server]:
    """Start the service with its data under `home`, wait for the line with its URL, stop it at the end."""
    process = subprocess.Popen(
        [*command, "serve", f"home={home}", "host=127.0.0.1", "port=0", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        cwd=cwd,
    )
    server = Server(process, "")
    ready = threading.Event()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            server.log.append(line)
            if not server.url and (found := URL.search(line)):
                server.url = found.group()
                ready.set()
        ready.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        if not ready.wait(timeout) or not server.url:
            raise RuntimeError("the service did not become ready:\n" + "".join(server.log))
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        reader.join(5)
        assert process.stdout is not None
        process.stdout.close()

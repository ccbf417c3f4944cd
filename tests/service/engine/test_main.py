"""The engine as the process that it is."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

from service.engine.messages import Command, Shutdown, encode
from tests.support.engines import tiny_engine_config

PATIENCE_S = 60


def run_engine(*commands: Command) -> subprocess.CompletedProcess[str]:
    """The end of an engine that finds all these commands, and then the end of the socket, when it has started."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(b"".join(encode(command) for command in commands))
        ours.shutdown(socket.SHUT_WR)
        return subprocess.run(
            [sys.executable, "-m", "service.engine", str(theirs.fileno())],
            check=False,
            pass_fds=[theirs.fileno()],
            stderr=subprocess.PIPE,
            text=True,
            timeout=PATIENCE_S,
        )


def test_one_that_is_asked_to_end_before_it_has_started_ends_quietly(tmp_path: Path) -> None:
    for commands in ((), (tiny_engine_config(tmp_path), Shutdown())):
        ended = run_engine(*commands)
        assert (ended.returncode, ended.stderr) == (0, "")

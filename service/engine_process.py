"""One engine process as the API process holds it: its socket, its log, its end. Torch-free."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from collections import deque
from pathlib import Path

import msgspec

from service.engine.messages import MAX_FRAME_BYTES, Command, Event, decode_event, encode

logger = logging.getLogger(__name__)

LOG_LINES = 20
MAX_LINE = 2000
PACKAGE_ROOT = Path(__file__).resolve().parents[1]


class EngineProcess:
    """Use `start`."""

    def __init__(
        self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer
        self._lines: deque[str] = deque(maxlen=LOG_LINES)
        self._log_task = asyncio.create_task(self._follow_log())

    @classmethod
    async def start(cls) -> EngineProcess:
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "service.engine", str(theirs.fileno())),
                pass_fds=[theirs.fileno()],
                env=_environment(),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,  # torch_npu prints there
                stderr=asyncio.subprocess.STDOUT,
            )
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        return cls(process, reader, writer)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def log_tail(self) -> str:
        """The last lines that the process printed."""
        return "\n".join(self._lines)

    def send(self, message: Command) -> None:
        """A process that is gone is noticed by `receive`. Raises ValueError for a message beyond the frame limit."""
        frame = encode(message)
        if len(frame) > MAX_FRAME_BYTES:
            raise ValueError(f"a message of {len(frame)} bytes is more than the engine takes ({MAX_FRAME_BYTES})")
        if not self._writer.is_closing():
            self._writer.write(frame)

    async def receive(self) -> Event | None:
        """The next event, None when the process has closed its end or talks nonsense."""
        try:
            size = int.from_bytes(await self._reader.readexactly(4), "big")
            return decode_event(await self._reader.readexactly(size))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        except msgspec.MsgspecError as error:
            logger.error("the engine sent a frame that cannot be read: %s", error)
            return None

    async def end(self, grace_s: float) -> int:
        """Wait for the end, kill it after `grace_s`, close everything. Returns the exit code, -N for signal N."""
        try:
            async with asyncio.timeout(grace_s):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
        finally:
            self._writer.close()
        await self._log_task
        assert self._process.returncode is not None
        return self._process.returncode

    async def _follow_log(self) -> None:
        assert self._process.stdout is not None
        rest = ""
        while data := await self._process.stdout.read(1 << 16):
            *lines, rest = (rest + data.decode("utf-8", "replace")).split("\n")
            rest = rest[-MAX_LINE:]
            for line in lines:
                self._take_line(line)
        self._take_line(rest)

    def _take_line(self, line: str) -> None:
        line = line.rstrip()[:MAX_LINE]
        if line:
            self._lines.append(line)
            logger.info("%s", line)


def describe_exit(code: int) -> str:
    """`signal 9 (SIGKILL)` or `exit code 1`."""
    if code >= 0:
        return f"exit code {code}"
    known = {number.value: number.name for number in signal.Signals}
    return f"signal {-code} ({known.get(-code, 'unknown')})"


def _environment() -> dict[str, str]:
    """With -P the child does not look for packages in the working directory, so it is told where ours are."""
    paths = [str(PACKAGE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}

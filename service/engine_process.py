"""One engine process as the API process holds it: its socket, its log, its end. Torch-free."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import struct
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import cast

import msgspec

from service.engine.messages import MAX_FRAME_BYTES, Command, Event, decode_event, encode

logger = logging.getLogger(__name__)

LOG_LINES = 20
LOG_GRACE_S = 0.5
"""How long the last lines of a process that is gone may take. What it started itself may hold its output open."""
MAX_LINE = 2000
LENGTH_BYTES = 4
RECEIVE_BYTES = 1 << 18
frame_length = struct.Struct("!I").unpack_from
PACKAGE_ROOT = Path(__file__).resolve().parents[1]

Take = Callable[[Event], None]


class EngineProcess:
    """Use `start`."""

    module = "service.engine"
    """What Python runs as the engine."""

    def __init__(self, process: asyncio.subprocess.Process, connection: _Connection) -> None:
        self._process = process
        self._connection = connection
        self._lines: deque[str] = deque(maxlen=LOG_LINES)
        self._log_task = asyncio.create_task(self._follow_log())

    @classmethod
    async def start(cls, take: Take) -> EngineProcess:
        """`take` is called with each event as it is read. When it raises, the connection ends."""
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", cls.module, str(theirs.fileno())),
                pass_fds=[theirs.fileno()],
                env=_environment(),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,  # torch_npu prints there
                stderr=asyncio.subprocess.STDOUT,
            )
        _, connection = await asyncio.get_running_loop().create_unix_connection(lambda: _Connection(take), sock=ours)
        return cls(process, connection)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def log_tail(self) -> str:
        """The last lines that the process printed."""
        return "\n".join(self._lines)

    def send(self, message: Command) -> None:
        """What is sent to a process that is gone is lost. Raises ValueError for a message beyond the frame limit."""
        frame = encode(message)
        if len(frame) > MAX_FRAME_BYTES:
            raise ValueError(f"a message of {len(frame)} bytes is more than the engine takes ({MAX_FRAME_BYTES})")
        self._connection.send(frame)

    async def wait_closed(self) -> None:
        """Until the process has closed its end, or was cut off since it talked nonsense."""
        await asyncio.shield(self._connection.closed)

    def kill(self) -> None:
        if self._process.returncode is None:
            self._process.kill()

    async def end(self, grace_s: float) -> int:
        """Wait for the end, kill it after `grace_s`, close everything. Returns the exit code, -N for signal N."""
        try:
            async with asyncio.timeout(grace_s):
                await self._process.wait()
        except TimeoutError:
            self.kill()
            await self._process.wait()
        finally:
            self._connection.close()
        await asyncio.wait([self._log_task], timeout=LOG_GRACE_S)
        self._log_task.cancel()
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


class _Connection(asyncio.BufferedProtocol):
    """Our end of the socket. All frames that have come are taken at once, without a task to wake up.

    They are read into one buffer: one of that size for each read would cost more than all the rest.
    """

    def __init__(self, take: Take) -> None:
        self.closed = asyncio.get_running_loop().create_future()
        self._take = take
        self._buffer = bytearray(RECEIVE_BYTES)
        self._filled = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        self.closed.set_result(None)

    def send(self, frame: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(frame)

    def close(self) -> None:
        self._transport.abort()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Twice as large when it is full: a frame may be larger."""
        if self._filled == len(self._buffer):
            self._buffer = self._buffer + bytes(self._filled)
        return memoryview(self._buffer)[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        self._filled += nbytes
        try:
            taken = self._take_frames(memoryview(self._buffer)[: self._filled])
        except msgspec.MsgspecError as error:
            logger.error("the engine sent a frame that cannot be read: %s", error)
            self.close()
        else:
            self._keep(self._buffer[taken : self._filled])

    def _take_frames(self, view: memoryview) -> int:
        """Returns how many bytes they were."""
        start, available = 0, len(view)
        while (begin := start + LENGTH_BYTES) <= available:
            end = begin + frame_length(view, start)[0]
            if end > available:
                break
            self._take(decode_event(view[begin:end]))
            start = end
        return start

    def _keep(self, rest: bytearray) -> None:
        if len(rest) <= RECEIVE_BYTES < len(self._buffer):
            self._buffer = bytearray(RECEIVE_BYTES)
        self._filled = len(rest)
        self._buffer[: self._filled] = rest


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

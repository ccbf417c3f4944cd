"""The engine's end of the socket: frames in, frames out, and a bell that other threads may ring. Knows no engine."""

from __future__ import annotations

import os
import selectors
import socket
from collections.abc import Iterable

from service.engine.messages import MAX_FRAME_BYTES, Command, Event, decode_command, encode

RECEIVE_BYTES = 1 << 20


class Channel:
    def __init__(self, sock: socket.socket) -> None:
        """Takes over a connected stream socket."""
        self._socket = sock
        self._buffer = bytearray()
        self._bell, self._ringer = os.pipe()
        os.set_blocking(self._bell, False)
        os.set_blocking(self._ringer, False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(sock, selectors.EVENT_READ)
        self._selector.register(self._bell, selectors.EVENT_READ)

    def ring(self) -> None:
        """Make a `receive` that waits return. From any thread."""
        try:
            os.write(self._ringer, b"\0")
        except BlockingIOError:
            return  # the pipe is full of rings that nobody has heard yet

    def receive(self, *, wait: bool) -> list[Command] | None:
        """The commands that have arrived, None when the other side is gone. With `wait`, blocks for one or a ring.

        Raises ValueError and msgspec's errors for what is no command.
        """
        for key, _ in self._selector.select(None if wait else 0):
            if key.fileobj is self._socket:
                data = self._read()
                if not data:
                    return None
                self._buffer += data
            else:
                os.read(self._bell, RECEIVE_BYTES)
        return self._take_commands()

    def send(self, events: Iterable[Event]) -> bool:
        """Blocks while the other side reads slowly. False when it is gone."""
        try:
            self._socket.sendall(b"".join(encode(event) for event in events))
        except ConnectionError:
            return False
        return True

    def close(self) -> None:
        self._selector.close()
        self._socket.close()
        os.close(self._bell)
        os.close(self._ringer)

    def _read(self) -> bytes:
        try:
            return self._socket.recv(RECEIVE_BYTES)
        except ConnectionError:
            return b""

    def _take_commands(self) -> list[Command]:
        commands: list[Command] = []
        start = 0
        while len(self._buffer) >= start + 4:
            size = int.from_bytes(self._buffer[start : start + 4], "big")
            if size > MAX_FRAME_BYTES:
                raise ValueError(f"a frame of {size} bytes is more than {MAX_FRAME_BYTES}")
            end = start + 4 + size
            if len(self._buffer) < end:
                break
            commands.append(decode_command(self._buffer[start + 4 : end]))
            start = end
        del self._buffer[:start]
        return commands

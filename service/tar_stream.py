"""A folder of plain files as a tar archive, piece by piece: nothing is held in memory or written to the disk."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

BLOCK = 512
CHUNK = 1 << 20
END = b"\0" * (2 * BLOCK)


class TarStream:
    """Opens every file at once, so that one that is removed meanwhile is sent whole. Iterate over it to its end, or
    `close` it."""

    def __init__(self, folder: Path, name: str, *, time: int) -> None:
        """Files stand in the archive as `name`/file, with the time `time`. Links and folders are left out."""
        with ExitStack() as stack:
            self._members: list[tuple[bytes, BinaryIO, int]] = []
            for path in sorted(folder.iterdir()):
                if path.is_symlink() or not path.is_file():
                    continue
                file = stack.enter_context(path.open("rb"))
                size = os.fstat(file.fileno()).st_size
                self._members.append((_header(f"{name}/{path.name}", size, time), file, size))
            self._stack = stack.pop_all()
        self.num_bytes = len(END) + sum(len(header) + size + _padding(size) for header, _, size in self._members)

    def __iter__(self) -> Iterator[bytes]:
        with self._stack:
            for header, file, size in self._members:
                yield header
                left = size
                while left > 0:
                    data = file.read(min(CHUNK, left))
                    if not data:
                        raise OSError(f"a file became shorter while it was sent: {left} bytes are missing")
                    left -= len(data)
                    yield data
                yield b"\0" * _padding(size)
            yield END

    def close(self) -> None:
        self._stack.close()


def _header(name: str, size: int, time: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.mtime, member.mode = size, time, 0o644
    return member.tobuf(tarfile.GNU_FORMAT)


def _padding(size: int) -> int:
    return -size % BLOCK

"""Records encoded on all cores, in their order. Torch-free.

`python -m trainer.data.workers` is one worker. It reads frames (length, msgpack) from standard input: first how to
encode, then lists of records; and writes as many frames of what became of them. It ends with its input, so none outlives
the trainer.
"""

from __future__ import annotations

import os
import queue
import signal
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, Self

import msgspec

from lm.template import load_template
from lm.tokenizer import load_tokenizer
from trainer.data.encoding import Encoded, Encoder
from trainer.data.errors import DataError
from trainer.data.records import Record

CHUNK_RECORDS = 256
CHUNK_CHARS = 1 << 20
"""A chunk ends with the record that brings it there."""
MAX_WORKERS = 32
AHEAD = 2
"""Chunks that are under way for each worker."""
_length = struct.Struct("<Q")


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderSpec:
    """An Encoder in words, from which each process makes its own."""

    model: str
    tokenizer_file: str | None
    max_seq_len: int
    masking: Literal["assistant", "last", "all"]
    truncation: Literal["right", "left", "split"]
    pairs: bool

    def build(self) -> Encoder:
        file = None if self.tokenizer_file is None else Path(self.tokenizer_file)
        template = load_template(Path(self.model), load_tokenizer(Path(self.model), file))
        return Encoder(
            template=template,
            max_seq_len=self.max_seq_len,
            masking=self.masking,
            truncation=self.truncation,
            pairs=self.pairs,
        )


class Refusal(msgspec.Struct):
    """A record that cannot be encoded."""

    message: str
    param: str | None


class Answer(msgspec.Struct):
    """What became of a list of records: all of them, or those before a bad one."""

    encoded: list[Encoded]
    refusal: Refusal | None = None


def encode_apart(records: Iterable[Record], spec: EncoderSpec, num_workers: int) -> Iterator[tuple[Record, Encoded]]:
    """Each record with its tokens, in order. Raises DataError as the Encoder does, once it is the record's turn."""
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(num_workers))
        idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for _ in range(num_workers):  # they are killed before the pool's threads, which wait for them, are waited for
            idle.put(stack.enter_context(_Worker(spec)))
        under_way: deque[tuple[list[Record], Future[Answer]]] = deque()
        stack.callback(_cancel, under_way)
        for chunk in _chunks(records):
            under_way.append((chunk, pool.submit(_ask, idle, chunk, spec)))
            if len(under_way) > AHEAD * num_workers:
                yield from _taken(*under_way.popleft())
        while under_way:
            yield from _taken(*under_way.popleft())


def _chunks(records: Iterable[Record]) -> Iterator[list[Record]]:
    chunk: list[Record] = []
    num_chars = 0
    for record in records:
        chunk.append(record)
        num_chars += record.num_chars
        if len(chunk) >= CHUNK_RECORDS or num_chars >= CHUNK_CHARS:
            yield chunk
            chunk, num_chars = [], 0
    if chunk:
        yield chunk


def available_cores() -> int:
    return min(MAX_WORKERS, len(os.sched_getaffinity(0)))


class _Worker:
    def __init__(self, spec: EncoderSpec) -> None:
        command = (sys.executable, "-P", "-m", "trainer.data.workers")
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen(command, env=environment, **pipes)
        self._write(spec)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):  # what it has not read is of no use any more
                pipe.close()

    def encode(self, records: list[Record]) -> Answer:
        self._write(records)
        assert self._process.stdout is not None
        data = _read_frame(self._process.stdout)
        if data is None:
            raise ChildProcessError(f"a process that tokenizes ended with exit code {self._process.wait()}")
        return msgspec.msgpack.decode(data, type=Answer)

    def _write(self, value: object) -> None:
        assert self._process.stdin is not None
        try:
            _write_frame(self._process.stdin, value)
        except BrokenPipeError as error:
            raise ChildProcessError(f"a process that tokenizes ended with exit code {self._process.wait()}") from error


def _ask(idle: queue.SimpleQueue[_Worker], chunk: list[Record], spec: EncoderSpec) -> Answer:
    worker = idle.get()
    try:
        return worker.encode(chunk)
    except (OverflowError, UnicodeEncodeError):  # a number or a text that JSON can say and msgpack cannot
        return _answer(chunk, spec.build())
    finally:
        idle.put(worker)


def _taken(chunk: list[Record], future: Future[Answer]) -> Iterator[tuple[Record, Encoded]]:
    answer = future.result()
    yield from zip(chunk, answer.encoded, strict=False)  # shorter where a record was refused
    if answer.refusal is not None:
        raise DataError(answer.refusal.message, param=answer.refusal.param)


def _cancel(under_way: Iterable[tuple[list[Record], Future[Answer]]]) -> None:
    for _, future in under_way:
        future.cancel()


def _write_frame(pipe: IO[bytes], value: object) -> None:
    data = msgspec.msgpack.encode(value)
    pipe.write(_length.pack(len(data)) + data)
    pipe.flush()


def _read_frame(pipe: IO[bytes]) -> bytes | None:
    head = pipe.read(_length.size)
    return None if len(head) < _length.size else pipe.read(_length.unpack(head)[0])


def _answer(records: list[Record], encoder: Encoder) -> Answer:
    encoded: list[Encoded] = []
    try:
        for record in records:
            encoded.append(encoder(record))
    except DataError as error:
        return Answer(encoded, Refusal(str(error), error.param))
    return Answer(encoded)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the trainer decides
    spec = _read_frame(sys.stdin.buffer)
    if spec is None:
        return
    encoder = msgspec.msgpack.decode(spec, type=EncoderSpec).build()
    while (data := _read_frame(sys.stdin.buffer)) is not None:
        _write_frame(sys.stdout.buffer, _answer(msgspec.msgpack.decode(data, type=list[Record]), encoder))


if __name__ == "__main__":
    main()

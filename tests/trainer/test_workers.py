"""Records that are encoded by processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import make_run
from trainer.data import dataset, workers
from trainer.data.errors import DataError
from trainer.data.records import Record, to_record
from trainer.data.workers import EncoderSpec, encode_apart


@pytest.fixture
def spec(tiny_llama: Path) -> EncoderSpec:
    return EncoderSpec(
        model=str(tiny_llama),
        tokenizer_file=None,
        max_seq_len=128,
        masking="assistant",
        truncation="right",
        pairs=False,
    )


def records(count: int) -> Iterator[Record]:
    for number in range(count):
        weight = {"weight": 0} if number % 3 == 0 else {}
        turns = [{"role": "user", "content": f"Q {number}"}, {"role": "assistant", "content": "ä" * 9, **weight}]
        yield to_record({"messages": turns}, f"here, record {number + 1}")


def test_all_records_come_back_in_order_and_as_this_process_encodes_them(
    spec: EncoderSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "CHUNK_RECORDS", 7)
    apart = list(encode_apart(records(100), spec, 2))
    encode = spec.build()
    assert [record.where for record, _ in apart] == [record.where for record in records(100)]
    assert [encoded for _, encoded in apart] == [encode(record) for record in records(100)]


def test_a_bad_record_ends_it_where_it_stands_and_its_processes_too(
    spec: EncoderSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "CHUNK_RECORDS", 4)
    good = list(records(10))
    bad = to_record({"prompt": "a", "chosen": "b", "rejected": "c"}, "here, record 11")
    apart = encode_apart([*good, bad, *good], spec, 2)
    assert [next(apart)[0].where for _ in good] == [record.where for record in good]
    with pytest.raises(DataError, match=r"^here, record 11: a preference of two answers"):
        next(apart)
    assert children() == []


def calling(arguments: dict[str, Any]) -> Record:
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "tool_calls": [call]}]
    return to_record({"messages": turns}, "here, record 1")


def test_what_no_frame_can_hold_is_encoded_or_refused_as_in_this_process(spec: EncoderSpec) -> None:
    large = calling({"a": 10**30})
    assert list(encode_apart([large], spec, 1)) == [(large, spec.build()(large))]
    with pytest.raises(DataError, match=r"^here, record 1: .*lone surrogate"):
        list(encode_apart([calling({"a": "\ud800"})], spec, 1))


def test_a_worker_that_dies_is_an_error_and_not_a_wait(spec: EncoderSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "CHUNK_RECORDS", 4)
    apart = encode_apart(records(1000), spec, 1)
    next(apart)
    os.kill(children()[0], signal.SIGKILL)
    with pytest.raises(ChildProcessError, match="ended with exit code -9"):
        list(apart)


def test_workers_end_with_the_process_that_started_them(spec: EncoderSpec, tmp_path: Path) -> None:
    program = (
        "import itertools, json, sys\n"
        "from tests.trainer.test_workers import records\n"
        "from trainer.data.workers import EncoderSpec, encode_apart\n"
        f"for _ in encode_apart(itertools.cycle(list(records(9))), EncoderSpec(**{vars_of(spec)!r}), 2):\n"
        "    print('on', flush=True)\n"
    )
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", program], cwd=root, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"on\n"
        started = children(parent.pid)
        assert len(started) == 2
        parent.kill()
        parent.stdout.read()
    deadline = time.monotonic() + 20
    while any(map(is_alive, started)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(is_alive, started))


def test_a_large_data_set_gives_the_same_store(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.trainer.test_dataset import prepare

    here = prepare(make_run(tmp_path / "here", tiny_llama))
    monkeypatch.setattr(dataset, "SMALL_BYTES", 0)
    apart = prepare(make_run(tmp_path / "apart", tiny_llama, num_threads=2))
    assert apart.report == here.report
    for name in ("ids.bin", "spans.bin", "index.bin", "store.json"):
        files = [tmp_path / run / "state/data" / name for run in ("here", "apart")]
        assert files[0].read_bytes() == files[1].read_bytes()


def vars_of(spec: EncoderSpec) -> dict[str, Any]:
    return {name: getattr(spec, name) for name in EncoderSpec.__dataclass_fields__}


def children(parent: int | None = None) -> list[int]:
    """The workers of a process, by /proc."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
            command = (path.parent / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == (parent or os.getpid()) and b"trainer.data.workers" in command:
            found.append(int(path.parent.name))
    return found


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True

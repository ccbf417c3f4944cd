"""Files and folders appear whole or not at all, whatever kills the writer."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lm.folder import publish, user_path, write_atomic

WRITER = """
import sys
from pathlib import Path
from lm.folder import publish, write_atomic, user_path

final = Path(sys.argv[1])
with publish(final) as folder:
    (folder / "weights").mkdir()
    with (folder / "weights" / "big").open("wb") as file:
        for number in range(1 << 30):
            file.write(bytes([number % 256]) * 65536)
            if number == 4:
                print("writing", flush=True)
"""
REPLACER = """
import itertools, sys
from pathlib import Path
from lm.folder import write_atomic, user_path

for number in itertools.count():
    write_atomic(Path(sys.argv[1]), str(number % 10).encode() * 200_000)
    if number == 3:
        print("writing", flush=True)
"""


def kill_while_writing(program: str, path: Path) -> None:
    """Start `program`, wait until it is in the middle of its work, and SIGKILL it."""
    with subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        process.kill()
    assert process.returncode == -signal.SIGKILL


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_published_folder_holds_what_was_written_and_is_readable_by_others(tmp_path: Path) -> None:
    final = tmp_path / "runs" / "one" / "step_1"
    with publish(final) as folder:
        assert not final.exists()
        assert folder.parent == final.parent
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("whole", encoding="utf-8")
    assert (final / "inner" / "file").read_text(encoding="utf-8") == "whole"
    assert names(final.parent) == ["step_1"]
    assert stat.S_IMODE(final.stat().st_mode) == 0o755


def test_a_writer_killed_in_the_middle_leaves_no_folder_with_the_final_name(tmp_path: Path) -> None:
    final = tmp_path / "step_1"
    kill_while_writing(WRITER, final)
    assert not final.exists()
    (left,) = names(tmp_path)
    assert left.startswith(".step_1.")
    assert left.endswith(".tmp")
    assert (tmp_path / left / "weights" / "big").stat().st_size > 0
    with publish(final) as folder:
        (folder / "file").touch()
    assert names(final) == ["file"]


def test_a_body_that_raises_leaves_nothing(tmp_path: Path) -> None:
    def fail_halfway() -> None:
        with publish(tmp_path / "step_1") as folder:
            (folder / "file").touch()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_halfway()
    assert names(tmp_path) == []


def test_a_folder_is_never_published_twice(tmp_path: Path) -> None:
    def lose_the_race() -> None:
        with publish(tmp_path / "step_2") as folder:
            (folder / "mine").touch()
            (tmp_path / "step_2").mkdir()
            (tmp_path / "step_2" / "theirs").touch()

    with publish(tmp_path / "step_1") as folder:
        (folder / "file").touch()
    with pytest.raises(FileExistsError, match="step_1 exists already"), publish(tmp_path / "step_1"):
        pytest.fail("the body must not run")
    with pytest.raises(OSError, match="not empty"):
        lose_the_race()
    assert names(tmp_path) == ["step_1", "step_2"]
    assert names(tmp_path / "step_2") == ["theirs"]


def test_everything_is_on_the_disk_before_the_folder_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final, synced = tmp_path / "step_1", []
    fsync = os.fsync

    def watch(descriptor: int) -> None:
        synced.append((Path(f"/proc/self/fd/{descriptor}").readlink().name, final.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    with publish(final) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").touch()
    assert {name for name, _ in synced} == {"file", "inner", folder.name, tmp_path.name}
    assert [name for name, published in synced if published] == [tmp_path.name]


def test_a_replaced_file_is_old_or_new_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.write_bytes(b"0" * 200_000)
    stop = threading.Event()

    def replace() -> None:
        for number in range(1, 60):
            write_atomic(path, str(number % 10).encode() * 200_000)
        stop.set()

    writer = threading.Thread(target=replace)
    writer.start()
    while not stop.is_set():
        data = path.read_bytes()
        assert len(data) == 200_000
        assert data == data[:1] * 200_000
    writer.join()
    assert names(tmp_path) == ["state.json"]


def test_a_replacer_killed_in_the_middle_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    kill_while_writing(REPLACER, path)
    data = path.read_bytes()
    assert len(data) == 200_000
    assert data == data[:1] * 200_000


def test_a_write_that_fails_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.json"
    write_atomic(path, b"old")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["state.json"]


def test_a_tilde_is_a_home_and_that_of_nobody_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/models") == tmp_path / "models"
    assert user_path("~no-such-user/models") == Path("~no-such-user/models")

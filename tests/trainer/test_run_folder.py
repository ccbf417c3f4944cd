from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lm.folder import publish
from trainer.run_folder import RunFolder, RunResult

HOLDER = """
import sys, time
from pathlib import Path
from trainer.run_folder import RunFolder
with RunFolder(Path(sys.argv[1])).locked():
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_half_written_event_is_left_for_the_next_read(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.read_events() == ([], 0)
    run.events.write_text('{"type": "started"}\n{"type": "st', encoding="utf-8")
    events, offset = run.read_events()
    assert [event["type"] for event in events] == ["started"]
    with run.events.open("a", encoding="utf-8") as file:
        file.write('ep"}\n')
    assert [event["type"] for event in run.read_events(offset)[0]] == ["step"]


def test_the_result_survives_the_round_trip(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.read_result() is None
    result = RunResult(status="failed", error_code="non_finite_loss", error_message="损失是 NaN")
    run.write_result(result)
    assert run.read_result() == result


def test_the_lock_is_seen_by_others_and_freed_by_a_sigkill(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert not run.is_locked()
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert run.is_locked()
        with pytest.raises(BlockingIOError), run.locked():
            pass
    finally:
        holder.kill()
        holder.communicate()
    assert not run.is_locked()


def test_the_log_tail_shows_the_last_state_of_a_progress_bar(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.log_tail() == ""
    run.log.write_bytes(b"one\n\nstep 1\rstep 2\rstep 3\nKilled\n")
    assert run.log_tail() == "one\nstep 3\nKilled"
    assert run.log_tail(num_lines=1) == "Killed"


def test_what_a_killed_trainer_was_writing_goes_and_what_is_complete_stays(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.remove_unfinished()  # of a run that came to no checkpoint
    with publish(run.adapters / "step_1") as folder:
        (folder / "adapter").write_bytes(b"whole")
    for parent in (run.adapters, run.checkpoints):
        half = parent / ".step_2.abcd.tmp"
        half.mkdir(parents=True)
        (half / "adapter").write_bytes(b"ha")
    run.remove_unfinished()
    assert [path.name for path in run.adapters.iterdir()] == ["step_1"]
    assert [*run.checkpoints.iterdir()] == []

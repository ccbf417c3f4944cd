"""A trainer as a process: started in its own group, or adopted from an earlier service process.

Liveness is a lock, not a pid. The lock file `alive` in the run folder is opened by us, locked, and inherited by the
trainer, so that the kernel frees it at any death of the trainer and at no death of ours.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import trainer
from trainer.run_folder import RunFolder

TRAINER = (sys.executable, "-P", "-m", "trainer")
CPU_NICENESS = 10


class TrainerProcess:
    """Not to be made directly: see `start` and `adopt`."""

    def __init__(self, run: RunFolder, *, pid: int | None, child: subprocess.Popen[bytes] | None) -> None:
        self.run = run
        self.pid = pid
        self.found_dead = child is None and not is_alive(run)
        """Whether it was gone already when it was adopted."""
        self._child = child
        self._kill_at = float("inf")

    @classmethod
    def start(
        cls, run: RunFolder, *, nice: bool, resume: bool = False, command: Sequence[str] = TRAINER
    ) -> TrainerProcess:
        """Start `command RUN_DIR`; what it prints goes to the run's log. `nice`: let others on the CPU go first.

        `resume`: go on from the state that the folder holds, rather than from the beginning.
        """
        with run.log.open("ab") as log, _lock_path(run).open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            child = subprocess.Popen(
                [*command, str(run.path), *(["--resume"] if resume else [])],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=trainer_environment(),
                process_group=0,  # no session of its own: Linux weighs niceness only within a session (autogroup)
                pass_fds=(lock.fileno(),),
            )
        if nice:
            with contextlib.suppress(ProcessLookupError):
                os.setpriority(os.PRIO_PROCESS, child.pid, CPU_NICENESS)
        return cls(run, pid=child.pid, child=child)

    @classmethod
    def adopt(cls, run: RunFolder, pid: int | None) -> TrainerProcess:
        """Take over a trainer that an earlier service process started, dead or alive.

        `pid` is None where that process died before it could note it; the trainer's own `started` event tells it then.
        """
        return cls(run, pid=pid, child=None)

    @property
    def is_adopted(self) -> bool:
        return self._child is None

    @property
    def exit_code(self) -> int | None:
        """Negative for a signal. None while it lives, and for an adopted one."""
        return None if self._child is None else self._child.returncode

    def has_ended(self) -> bool:
        """Also kills it, when it has outlived the grace period of `terminate`."""
        ended = not is_alive(self.run) if self._child is None else self._child.poll() is not None
        if not ended and time.monotonic() > self._kill_at:
            self._signal_group(signal.SIGKILL)
        return ended

    def terminate(self, grace_s: float) -> None:
        """Ask it to end within a step; `has_ended` kills it after `grace_s`."""
        self._kill_at = min(self._kill_at, time.monotonic() + grace_s)
        if not self.has_ended():
            self._signal_group(signal.SIGTERM)

    def pause(self, grace_s: float = float("inf")) -> None:
        """Ask it to save its state and end; `has_ended` kills it after `grace_s`.

        One that has not come to listen yet dies of it, and has lost nothing.
        """
        self._kill_at = min(self._kill_at, time.monotonic() + grace_s)
        if not self.has_ended() and (pid := self._find_pid()) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR1)  # not the group: its helpers would die of it

    def kill(self) -> None:
        """End it at once, and wait for that."""
        if not self.has_ended():
            self._signal_group(signal.SIGKILL)
        if self._child is not None:
            self._child.wait()

    def _signal_group(self, number: signal.Signals) -> None:
        if (pid := self._find_pid()) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, number)

    def _find_pid(self) -> int | None:
        if self.pid is None:
            started = [event for event in self.run.read_events()[0] if event["type"] == "started"]
            self.pid = started[-1]["pid"] if started else None
        return self.pid


def is_alive(run: RunFolder) -> bool:
    """Whether a trainer that some service process started lives in this run folder."""
    try:
        with _lock_path(run).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _lock_path(run: RunFolder) -> Path:
    return run.path / "alive"


def trainer_environment() -> dict[str, str]:
    """Ours, with the folder that holds the trainer package first, wherever the service was started."""
    packages = str(Path(trainer.__file__).parent.parent)
    paths = [packages, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    }

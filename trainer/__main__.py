"""`python -m trainer RUN_DIR [--resume]`: run what RUN_DIR/config.yaml says, to one of its ends.

With --resume a run that was paused, failed or was killed goes on in its folder from its newest state, to the same end.
SIGUSR1 pauses; SIGTERM and SIGINT cancel.

Exit code 0: succeeded, paused or cancelled. 1: failed. In both cases result.json says more. 2: nothing was started and
nothing was written, since RUN_DIR is no run folder, was used before (without --resume), is over, or is in use.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from pathlib import Path
from types import FrameType

from tqdm.contrib.logging import logging_redirect_tqdm

from trainer.config import RunConfig, load_run_config
from trainer.outcome import Cancelled, Paused, result_of
from trainer.progress import Progress
from trainer.run_folder import RunFolder, RunResult
from trainer.tracking import start_trackers

log = logging.getLogger("trainer")


class StopRequest:
    """Set by SIGTERM and SIGINT, and SIGUSR1 for a pause; the run looks at it between batches."""

    def __init__(self) -> None:
        self._signals: set[int] = set()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._set)

    def _set(self, number: int, frame: FrameType | None) -> None:
        self._signals.add(number)

    def check(self) -> None:
        """Raises Cancelled or Paused once a signal has come."""
        if self._signals - {signal.SIGUSR1}:
            raise Cancelled(", ".join(sorted(signal.Signals(number).name for number in self._signals)))
        if self._signals:
            raise Paused


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer", description="Run one fine-tuning run.")
    parser.add_argument("run_dir", type=Path, help="a folder with a config.yaml; the results appear beside it")
    parser.add_argument("--resume", action="store_true", help="go on from the newest training state")
    arguments = parser.parse_args()
    folder = RunFolder(arguments.run_dir)
    stop = StopRequest()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    if not folder.config.is_file():
        return _refuse(f"there is no {folder.config}")
    try:
        with folder.locked():
            if reason := _refusal(folder, resume=arguments.resume):
                return _refuse(reason)
            if arguments.resume:
                folder.remove_unfinished()
                folder.result.unlink(missing_ok=True)
            result = run(folder, stop, resume=arguments.resume)
            folder.write_result(result)
            if result.status == "succeeded":
                folder.remove_state()
    except BlockingIOError:
        return _refuse(f"another trainer is at work in {folder.path}")
    return 1 if result.status == "failed" else 0


def run(folder: RunFolder, stop: StopRequest, *, resume: bool = False) -> RunResult:
    config: RunConfig | None = None
    try:
        with Progress(folder) as progress:
            config = load_run_config(folder.config)
            train(config, folder, progress, stop, resume=resume)
    except Exception as error:  # the last place that can say how the run ended
        result = result_of(error, config)
        if result.error_code == "internal_error":
            log.exception("the run failed")
        else:
            log.error(f"{result.status}: {result.error_message}" if result.error_message else result.status)
        return result
    log.info("succeeded")
    return RunResult(status="succeeded")


def train(config: RunConfig, folder: RunFolder, progress: Progress, stop: StopRequest, *, resume: bool) -> None:
    progress.attach(start_trackers(config, folder))
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    # How long OpenMP's threads spin before they sleep. By default it is milliseconds: beside processes that want the
    # same cores, such as the engine, a step took 10 times as long. Not to spin cost 1.6 times on free cores, this 1.1
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    from trainer.recipes import RECIPES  # imports torch, which reads these variables

    recipe = RECIPES[config.recipe](config, folder, progress, stop.check)
    try:
        recipe.setup(resume=resume)
        with logging_redirect_tqdm():  # a line of the log does not end up inside the progress bar
            recipe.train()
    except Paused:
        progress.event("paused", step=recipe.position.step)
        raise


def _refusal(folder: RunFolder, *, resume: bool) -> str | None:
    result = folder.read_result()
    if resume:
        return f"{folder.path} has succeeded; there is nothing to go on with" if _succeeded(result) else None
    if folder.events.exists() or result is not None:
        return f"{folder.path} was run before; copy its config.yaml into a new folder, or go on with --resume"
    return None


def _succeeded(result: RunResult | None) -> bool:
    return result is not None and result.status == "succeeded"


def _refuse(message: str) -> int:
    log.error(message)
    return 2


if __name__ == "__main__":
    sys.exit(main())

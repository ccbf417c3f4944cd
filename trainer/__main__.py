"""`python -m trainer RUN_DIR`: run what RUN_DIR/config.yaml says, to one of its ends.

Exit code 0: succeeded, or cancelled by SIGTERM or SIGINT. 1: failed. In both cases result.json says more. 2: nothing
was started and nothing was written, since RUN_DIR is no run folder, was used before, or is in use.
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
from trainer.outcome import Cancelled, result_of
from trainer.progress import Progress
from trainer.run_folder import RunFolder, RunResult

log = logging.getLogger("trainer")


class StopRequest:
    """Set by SIGTERM and SIGINT; the run looks at it between steps."""

    def __init__(self) -> None:
        self._signal: int | None = None
        signal.signal(signal.SIGTERM, self._set)
        signal.signal(signal.SIGINT, self._set)

    def _set(self, number: int, frame: FrameType | None) -> None:
        self._signal = number

    def check(self) -> None:
        """Raises Cancelled once a signal has come."""
        if self._signal is not None:
            raise Cancelled(signal.Signals(self._signal).name)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer", description="Run one fine-tuning run.")
    parser.add_argument("run_dir", type=Path, help="a folder with a config.yaml; the results appear beside it")
    folder = RunFolder(parser.parse_args().run_dir)
    stop = StopRequest()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    if not folder.config.is_file():
        return _refuse(f"there is no {folder.config}")
    try:
        with folder.locked():
            if folder.events.exists() or folder.result.exists():
                return _refuse(f"{folder.path} was run before; copy its config.yaml into a new folder")
            result = run(folder, stop)
            folder.write_result(result)
    except BlockingIOError:
        return _refuse(f"another trainer is at work in {folder.path}")
    return 1 if result.status == "failed" else 0


def run(folder: RunFolder, stop: StopRequest) -> RunResult:
    config: RunConfig | None = None
    try:
        with Progress(folder) as progress:
            config = load_run_config(folder.config)
            train(config, folder, progress, stop)
    except Exception as error:  # the last place that can say how the run ended
        result = result_of(error, config)
        if result.error_code == "internal_error":
            log.exception("the run failed")
        else:
            log.error(f"{result.status}: {result.error_message}" if result.error_message else result.status)
        return result
    log.info("succeeded")
    return RunResult(status="succeeded")


def train(config: RunConfig, folder: RunFolder, progress: Progress, stop: StopRequest) -> None:
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    # How long OpenMP's threads spin before they sleep. By default it is milliseconds: beside processes that want the
    # same cores, such as the engine, a step took 10 times as long. Not to spin cost 1.6 times on free cores, this 1.1
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    from trainer.recipes import RECIPES  # imports torch, which reads these variables

    recipe = RECIPES[config.recipe](config, folder, progress, stop.check)
    recipe.setup()
    with logging_redirect_tqdm():  # a line of the log does not end up inside the progress bar
        recipe.train()


def _refuse(message: str) -> int:
    log.error(message)
    return 2


if __name__ == "__main__":
    sys.exit(main())

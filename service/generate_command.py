"""`tuneserve generate`: one answer to one prompt, without a service. Torch-free: the model is in a child process."""

from __future__ import annotations

import subprocess
import sys

from service.jobs.trainer_process import trainer_environment
from trainer.torchtune.generation import GenerationConfig

GENERATE = (sys.executable, "-P", "-m", "service.engine.generate")


def run_generate(config: GenerationConfig) -> int:
    """The text goes to stdout as it comes, the log to stderr. The exit code is the child's: 2 for a user's mistake."""
    child = subprocess.run([*GENERATE], input=config.model_dump_json().encode(), env=trainer_environment(), check=False)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode

"""Runs `on_device/` in an interpreter of its own: a process has one accelerator backend, for good."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = Path(__file__).parent / "on_device"


def test_the_product_and_the_device_itself_pass_on_the_simulated_npu() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "tests.npu.plugin", "-p", "no:cacheprovider", "-q", str(FOLDER)]
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, f"\n{run.stdout}{run.stderr}"

"""pytest plugin that gives the process the simulated device. For one file by hand:

python -m pytest -p tests.npu.plugin tests/npu/on_device/test_tensors.py
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.npu.simulated.device import SimulatedNpu, install

DEVICE = pytest.StashKey[SimulatedNpu]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[DEVICE] = install()


@pytest.fixture
def npu(request: pytest.FixtureRequest) -> Iterator[SimulatedNpu]:
    """The device, with counters at zero. A test may lower its capacity."""
    device = request.config.stash[DEVICE]
    device.statistics.reset()
    device.memory.reset_peaks()
    capacity = device.memory.capacity
    yield device
    device.memory.capacity, device.memory.fraction = capacity, 1.0


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint made elsewhere: transformers, which makes it, would take the simulated torch_npu for the real one."""
    folder = tmp_path_factory.mktemp("tiny_llama")
    program = "import sys; from pathlib import Path; from tests.support.tiny import make_tiny_llama; "
    program += "make_tiny_llama(Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", program, str(folder)], cwd=Path(__file__).parents[2], check=True)
    return folder

"""pytest plugin that gives the process the simulated device. For one file by hand:

python -m pytest -p tests.npu.plugin tests/npu/on_device/test_tensors.py
"""

from __future__ import annotations

from collections.abc import Iterator

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
    device.memory.capacity = capacity

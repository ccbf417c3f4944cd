"""Keeps the tests that need the simulated device out of a process that does not have it."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`on_device/` is run by test_on_simulated_npu.py, or by hand as tests/npu/plugin.py says."""
    if "on_device" in collection_path.parts and not config.pluginmanager.has_plugin("tests.npu.plugin"):
        return True
    return None

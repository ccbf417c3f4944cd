"""Fixtures that several test packages share, and the rule that a skip is a failure where CI says so."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator

import pytest

FIGURES = pytest.StashKey[list[tuple[str, str]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FIGURES] = []
    # Before a test imports torch: threads that spin stall each other where tests run beside something else
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[[str, object], None]:
    """Note a measured figure; all of them are printed at the end of the run."""

    def note(name: str, value: object) -> None:
        request.config.stash[FIGURES].append((name, str(value)))

    return note


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    figures = terminalreporter.config.stash[FIGURES]
    if figures:
        terminalreporter.section("figures")
        for name, value in figures:
            terminalreporter.write_line(f"{name}: {value}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """TUNESERVE_SKIP_IS_FAILURE=1 (set by .ci/run) turns every skip into a failure that keeps its reason."""
    report = yield
    if os.environ.get("TUNESERVE_SKIP_IS_FAILURE") == "1" and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, which is a failure here: {report.longrepr}"
    return report

"""Fixtures that several test packages share, and the rule that a skip is a failure where CI says so."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator

import pytest

FIGURE = "figure"


def pytest_configure(config: pytest.Config) -> None:
    # Before a test imports torch: threads that spin stall each other where tests run beside something else
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[[str, object], None]:
    """Note a measured figure; all of them are printed at the end of the run, from whichever process they come."""

    def note(name: str, value: object) -> None:
        request.node.user_properties.append((FIGURE, f"{name}: {value}"))

    return note


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    told = [getattr(report, "user_properties", ()) for report in reports if getattr(report, "when", "") == "teardown"]
    figures = [value for properties in told for name, value in properties if name == FIGURE]
    if figures:
        terminalreporter.section("figures")
        for figure in figures:
            terminalreporter.write_line(figure)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """TUNESERVE_SKIP_IS_FAILURE=1 (set by .ci/run) turns every skip into a failure that keeps its reason."""
    report = yield
    if os.environ.get("TUNESERVE_SKIP_IS_FAILURE") == "1" and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, which is a failure here: {report.longrepr}"
    return report

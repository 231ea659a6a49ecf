"""A pytest plugin that makes a skipped test a failed one, unless the test is marked `gpu`.

For `.ci/run`, where everything but a GPU is there: `PYTHONPATH=tests/plugins pytest -p forbid_skips`. On anybody
else's machine a test that lacks something is skipped with its reason, and this plugin is not loaded.
"""

from __future__ import annotations

from collections.abc import Generator

import pytest


def _refuse(report: pytest.TestReport | pytest.CollectReport) -> None:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
    report.outcome = "failed"
    report.longrepr = f"skips are forbidden in this run, and this was skipped: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    # A test that is expected to fail reports itself as skipped too.
    if report.skipped and not hasattr(report, "wasxfail") and item.get_closest_marker("gpu") is None:
        _refuse(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """A module that skips itself as a whole."""
    report = yield
    if report.skipped:
        _refuse(report)
    return report

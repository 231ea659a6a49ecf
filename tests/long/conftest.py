"""Fixtures of the long tests, which share the harness of the system tests, and what they say at their end."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "system"))
sys.path.insert(0, str(Path(__file__).parent))

import matrix
from machine import Machine, machine

from llmosd.launch.reap import adopt_orphans

#: Seconds between two looks for orphans; the next daemon takes many times that to start.
REAP_S = 0.02


@pytest.fixture(scope="session")
def an_init() -> Iterator[None]:
    """Orphans are reaped at once, as by most machines' init. Not by every one: exits can still be told then."""
    adopt_orphans()
    end = threading.Event()

    def reap() -> None:
        while not end.wait(REAP_S):
            try:
                while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
                    if os.getsid(ended.si_pid) == os.getsid(0):
                        break  # our own child, whom somebody here waits for; the next look comes soon
                    os.waitid(os.P_PID, ended.si_pid, os.WEXITED | os.WNOHANG)
            except (ChildProcessError, ProcessLookupError):
                pass  # there is none, or it was reaped meanwhile

    thread = threading.Thread(target=reap, daemon=True)
    thread.start()
    yield
    end.set()
    thread.join()


@pytest.fixture
def a_machine(an_init: None) -> Iterator[Machine]:
    """A machine whose daemon was not started yet."""
    with machine() as made:
        yield made


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What was tried and found, in figures: also of tests that passed, also where several processes ran them."""
    reports = [
        report
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, [])
        if report.when == "call"
    ]
    for line in matrix.summary(reports):
        terminalreporter.write_line(line)
    for report in reports:
        for name, value in report.user_properties:
            if name == "figures":
                terminalreporter.write_line(str(value))

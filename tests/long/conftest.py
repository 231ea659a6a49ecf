"""Fixtures of the long tests, which share the harness of the system tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "system"))
sys.path.insert(0, str(Path(__file__).parent))

from machine import Machine, machine


@pytest.fixture
def a_machine() -> Iterator[Machine]:
    """A machine whose daemon was not started yet."""
    with machine() as made:
        yield made

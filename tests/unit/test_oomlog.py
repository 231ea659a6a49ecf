"""Victims of the OOM killer, as the kernel's log names them."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from llmosd.node.oomlog import OomLog


@pytest.fixture
def log() -> Iterator[tuple[OomLog, int]]:
    """A log over a pipe of packets, each of which is a record; and its writing end."""
    found = OomLog()
    found.close()
    found._fd, writer = os.pipe2(os.O_NONBLOCK | os.O_DIRECT)
    try:
        yield found, writer
    finally:
        found.close()
        os.close(writer)


def test_a_victim_is_known_once_and_a_bystander_never(log: tuple[OomLog, int]) -> None:
    oom, writer = log
    os.write(writer, b"4,1203,5;python3 invoked oom-killer: gfp_mask=0xcc0(GFP_KERNEL), order=0, oom_score_adj=0\n")
    os.write(writer, b"3,1230,9;Memory cgroup out of memory: Killed process 779 (python3) total-vm:216492kB\n")
    os.write(writer, b"3,1231,9;Out of memory: Killed process 12 (a (b) c) total-vm:1kB\n")
    assert not oom.took(77)
    assert oom.took(779)
    assert not oom.took(779), "its number may be another's by now"
    assert oom.took(12)


def test_where_the_log_may_not_be_read_nobody_is_known() -> None:
    log = OomLog()
    log.close()
    assert not log.took(1)


def test_strangers_are_not_remembered_without_bound(log: tuple[OomLog, int]) -> None:
    oom, writer = log
    for pid in range(1, 1200):
        os.write(writer, b"3,1,1;Out of memory: Killed process %d (x)\n" % pid)
        oom.took(0)
    assert not oom.took(1)
    assert oom.took(1199)

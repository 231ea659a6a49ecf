"""When a worker is looked at: on real processes, and on a file in the place of a cgroup's."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llmosd.kernel.spec import Limits
from llmosd.node import looks as module
from llmosd.node.cgroups import CgroupGroup
from llmosd.node.groups import Group
from llmosd.node.looks import Looks
from llmosd.node.marked import MarkedGroup
from llmosd.node.records import start_ticks

Start = Callable[[str], "subprocess.Popen[str]"]
LIMITS = {"sim@1": Limits()}


class Worker:
    """As much of a life as a look asks for."""

    def __init__(self, group: Group) -> None:
        self.worker = "sim@1"
        self.group = group


class Still:
    """A worker that sleeps, and was looked at until it was found to."""

    def __init__(self, group: Group) -> None:
        self.life = Worker(group)
        self.looks = Looks()
        # The first look, and the one after it, which finds that nothing ran in between.
        assert self.is_due()
        assert self.is_due()

    def is_due(self, limits: dict[str, Limits] = LIMITS) -> bool:
        return [due.life for due in self.looks.due([self.life], limits)] == [self.life]  # type: ignore[list-item]


@pytest.fixture
def process(start: Start) -> subprocess.Popen[str]:
    """One that sleeps until it gets a line; then it has worked, says so, and sleeps again."""
    process = start(
        "import sys, time\n"
        "print('ready', flush=True)\n"
        "for line in sys.stdin:\n"
        "    end = time.process_time() + 0.05\n"
        "    while time.process_time() < end: pass\n"
        "    print('worked', flush=True)"
    )
    assert process.stdout is not None
    process.stdout.readline()
    return process


@pytest.fixture
def marked(process: subprocess.Popen[str]) -> Iterator[Still]:
    # Its last steps into sleep may still be under way.
    group = MarkedGroup(process.pid, start_ticks(process.pid) or 0, "the test's")
    looks, life = Looks(), Worker(group)
    while looks.due([life], LIMITS):  # type: ignore[list-item]
        pass
    yield Still(group)


@pytest.fixture
def cpu_stat(tmp_path: Path) -> Path:
    path = tmp_path / "cpu.stat"
    path.write_text("usage_usec 1000\n")
    return path


@pytest.fixture
def grouped(cpu_stat: Path) -> Still:
    return Still(CgroupGroup(cpu_stat.parent))


def test_a_still_worker_is_not_looked_at(marked: Still, grouped: Still) -> None:
    for still in (marked, grouped):
        assert not still.is_due()
        assert not still.is_due()


def test_a_process_that_wakes_up_is_looked_at_and_once_more_when_it_sleeps_again(
    marked: Still, process: subprocess.Popen[str]
) -> None:
    assert not marked.is_due()
    assert process.stdin is not None and process.stdout is not None
    print("work", file=process.stdin, flush=True)
    assert process.stdout.readline() == "worked\n"
    (due,) = marked.looks.due([marked.life], LIMITS)  # type: ignore[list-item]
    assert due.members == [process.pid]
    while marked.is_due():
        pass  # it goes to sleep; pytest's timeout bounds it


def test_a_cgroup_in_which_anything_ran_is_looked_at_and_once_more_afterwards(grouped: Still, cpu_stat: Path) -> None:
    assert not grouped.is_due()
    cpu_stat.write_text("usage_usec 1001\n")
    assert [grouped.is_due() for _ in range(3)] == [True, True, False]


def test_new_limits_are_held_against_what_a_still_worker_uses(grouped: Still) -> None:
    lower = {"sim@1": Limits(memory_max=1 << 20)}  # type: ignore[arg-type]
    assert [grouped.is_due(lower) for _ in range(2)] == [True, False]


def test_a_still_worker_is_looked_at_now_and_then(grouped: Still, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STILL_S", -1.0)
    grouped.is_due({"sim@1": Limits()})
    assert grouped.is_due()
    assert grouped.is_due()


def test_where_the_cpu_time_cannot_be_read_every_look_counts(tmp_path: Path) -> None:
    still = Still(CgroupGroup(tmp_path / "gone"))
    assert [still.is_due() for _ in range(3)] == [True, True, True]


def test_what_was_known_of_a_worker_that_is_gone_is_let_go(grouped: Still) -> None:
    assert grouped.looks.due([], {}) == []
    assert grouped.looks._known == {}

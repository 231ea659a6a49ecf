"""Groups that are cgroups (v2): exact, killed in one write, their end announced. With controllers, limited as a whole.

Whoever makes the cgroup (`delegated.py`, systemd in `scopes.py`), what is done with it is here.
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec

from llmosd.kernel.spec import Limits
from llmosd.node import counters
from llmosd.node.counters import Counters
from llmosd.node.devices import usable_cpus
from llmosd.node.groups import signal_process

#: The length of the windows over which cpu_quota is measured, in microseconds: the kernel's own default.
_PERIOD_US: Final = 100_000


class Knob(msgspec.Struct, frozen=True):
    """The interface file by which a limit is set on a cgroup."""

    controller: str
    file: str
    #: What is written for no limit.
    unset: str = "max"
    write: Callable[[Any], str] = lambda value: str(int(value))


#: By limit; cgroup-v2.rst describes each file.
KNOBS: Final = {
    "allowed_cpus": Knob("cpuset", "cpuset.cpus", write=str),
    "cpu_weight": Knob("cpu", "cpu.weight", "100"),
    "cpu_quota": Knob("cpu", "cpu.max", "max", lambda percent: f"{round(percent * _PERIOD_US / 100)} {_PERIOD_US}"),
    "memory_high": Knob("memory", "memory.high"),
    "memory_max": Knob("memory", "memory.max"),
    "swap_max": Knob("memory", "memory.swap.max"),
    "tasks_max": Knob("pids", "pids.max"),
    "io_weight": Knob("io", "io.weight", "default 100", lambda weight: f"default {weight}"),
}


class CgroupGroup:
    """A group that is a cgroup. Needs no controller."""

    exact = True

    def __init__(self, path: Path, limits: Limits | None = None, held: frozenset[str] = frozenset()) -> None:
        """`held`: the limits that this cgroup's controllers know; `limits`: what it begins with."""
        self._path = path
        self._limits = limits
        self.held = held
        self.cgroup = str(path)

    def enter(self, pid: int) -> None:
        self._path.mkdir(parents=True, exist_ok=True)
        for name in self.held:
            if self._limits is not None and (value := getattr(self._limits, name)) is not None:
                (self._path / KNOBS[name].file).write_text(KNOBS[name].write(value))
        (self._path / "cgroup.procs").write_text(str(pid))

    def limit(self, limits: Limits, before: Limits | None) -> list[str]:
        failed = []
        for name in changed(limits, before) & self.held:
            knob, value = KNOBS[name], getattr(limits, name)
            try:
                # To a cgroup with processes the kernel refuses an empty cpuset: ENOSPC.
                unset = str(usable_cpus()) if name == "allowed_cpus" else knob.unset
                (self._path / knob.file).write_text(unset if value is None else knob.write(value))
            except OSError as error:
                failed.append(f"{name} could not be changed ({knob.file}: {error.strerror})")
        return failed

    def counters(self) -> Counters:
        return counters.read(self._path)

    def members(self) -> list[int]:
        pids = []
        # An engine may make cgroups of its own below.
        for directory in self._directories():
            try:
                pids += [int(line) for line in (directory / "cgroup.procs").read_text().split()]
            except OSError:
                continue  # that cgroup is gone
        return sorted(set(pids))

    def _directories(self) -> list[Path]:
        # Not Path.glob: it raises when a directory goes while it is being looked at.
        return [Path(directory) for directory, _, _ in os.walk(self._path)]

    def kill(self) -> None:
        try:
            (self._path / "cgroup.kill").write_text("1")
        except FileNotFoundError:
            return  # before Linux 5.14, or the cgroup is gone
        except OSError:
            for pid in self.members():
                signal_process(pid, signal.SIGKILL)

    def wait_empty(self, timeout: float) -> bool:
        deadline = time.monotonic() + timeout
        try:
            with (self._path / "cgroup.events").open() as events:
                poll = select.poll()
                # The kernel announces a change of cgroup.events with POLLPRI (cgroup-v2.rst, "populated").
                poll.register(events, select.POLLPRI)
                while True:
                    events.seek(0)
                    if "populated 0" in events.read():
                        return True
                    left = deadline - time.monotonic()
                    if left <= 0:
                        return False
                    poll.poll(left * 1000)
        except OSError:
            return not self._path.exists()

    def freeze(self, frozen: bool) -> None:
        (self._path / "cgroup.freeze").write_text("1" if frozen else "0")

    def is_frozen(self) -> bool:
        try:
            return (self._path / "cgroup.freeze").read_text().strip() == "1"
        except OSError:
            return False

    def release(self) -> None:
        # The deepest first; one that holds a process stays.
        for directory in sorted(self._directories(), reverse=True):
            try:
                directory.rmdir()
            except OSError:
                pass  # already gone, or not empty after all: the next daemon looks again


def changed(limits: Limits, before: Limits | None) -> set[str]:
    """The names of the limits that differ; without `before`, of those that are set."""
    base = Limits() if before is None else before
    return {name for name in limits.__struct_fields__ if getattr(limits, name) != getattr(base, name)}

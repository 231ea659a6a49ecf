"""Groups that are cgroups (v2): exact, killed in one write, their end announced. With controllers, limited as a whole.

The tree is ours alone: a directory below the cgroup that the daemon was started in. Its leaves are the workers' groups,
and the daemon's own where controllers are on, for then no inner node may hold a process (cgroup-v2.rst, "No Internal
Process Constraint"). Cgroups that are not ours are never written to, but for switching a controller on in the one
that we were given.
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
from llmosd.launch.cgroup import cgroup_of
from llmosd.node import counters
from llmosd.node.counters import Counters
from llmosd.node.devices import usable_cpus
from llmosd.node.groups import Group, signal_process
from llmosd.node.records import Record

#: The length of the windows over which cpu_quota is measured, in microseconds: the kernel's own default.
_PERIOD_US: Final = 100_000
#: Name of the daemon's own leaf.
_OWN_LEAF: Final = "daemon"


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

    def __init__(self, path: Path, limits: Limits | None = None, held: frozenset[str] = frozenset()) -> None:
        """`held`: the limits that this cgroup's controllers know; `limits`: what it begins with."""
        self._path = path
        self._limits = limits
        self._held = held
        self.cgroup = str(path)

    def enter(self, pid: int) -> None:
        self._path.mkdir(parents=True, exist_ok=True)
        for name in self._held:
            if self._limits is not None and (value := getattr(self._limits, name)) is not None:
                (self._path / KNOBS[name].file).write_text(KNOBS[name].write(value))
        (self._path / "cgroup.procs").write_text(str(pid))

    def limit(self, limits: Limits, before: Limits | None) -> list[str]:
        failed = []
        for name in changed(limits, before) & self._held:
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


class CgroupGroups:
    """Cgroups in a directory of our own."""

    exact = True

    def __init__(self, base: Path, held: frozenset[str] = frozenset()) -> None:
        self.base = base
        self.held = held

    def new(self, worker: str, incarnation: int, mark: str, limits: Limits) -> Group:
        return CgroupGroup(self.base / f"{worker}-{incarnation}", limits, self.held)

    def known(self, record: Record, mark: str) -> Group:
        path = Path(record.cgroup)
        return CgroupGroup(path, held=self.held if path.parent == self.base else frozenset())

    def unknown(self, known: set[str]) -> list[tuple[str, Group]]:
        marks = [(f"{self.base.name}/{path.name}", path) for path in self.base.glob("*/") if path.name != _OWN_LEAF]
        return [(mark, CgroupGroup(path)) for mark, path in marks if mark not in known]

    def set_apart(self, name: str, pid: int) -> None:
        """Nobody here ends what is in the daemon's own cgroup."""

    def sweep(self) -> None:
        for path in self.base.glob("*/"):
            if path.name != _OWN_LEAF:
                CgroupGroup(path).release()

    def close(self) -> None:
        try:
            self.base.rmdir()
        except OSError:
            pass  # workers live on in it, or we do


class NotDelegated(OSError):  # noqa: N818  # an answer, not a fault
    """There is no cgroup v2 tree that we may arrange. The text says why, and what to do."""


def without_controllers(name: str) -> CgroupGroups:
    """Groups below the cgroup that we are in, to kill and freeze by. `name`: of our directory. Raises NotDelegated."""
    base = _own_cgroup(name) / name
    try:
        base.mkdir(exist_ok=True)
        if not (base / "cgroup.kill").exists() or not os.access(base / "cgroup.procs", os.W_OK):
            base.rmdir()
            raise NotDelegated(f"{base} cannot be used: it needs Linux 5.14, and to be ours to write")
    except OSError as error:
        raise NotDelegated(f"{base} cannot be made: {error.strerror}") from None
    return CgroupGroups(base)


def with_controllers(name: str) -> CgroupGroups:
    """Groups whose controllers hold limits: those that are available below the cgroup that we are in.

    We move into a leaf of our own first, so we must be alone in that cgroup. Raises NotDelegated.
    """
    groups = without_controllers(name)
    base, ours = groups.base, groups.base.parent
    available = set((ours / "cgroup.controllers").read_text().split()) & {knob.controller for knob in KNOBS.values()}
    if not available:
        raise NotDelegated(f"{ours} has none of the controllers cpu, cpuset, memory, pids and io (cgroup.controllers)")
    others = {int(pid) for pid in (ours / "cgroup.procs").read_text().split()} - {os.getpid()}
    if others and (ours / "cgroup.type").exists():  # the root of the whole tree has none, and may hold processes
        raise NotDelegated(
            f"{len(others)} other processes are in {ours}, and controllers need it empty; start llmosd in a cgroup of "
            "its own, as a service with Delegate=yes or in a container is"
        )
    try:
        (base / _OWN_LEAF).mkdir(exist_ok=True)
        (base / _OWN_LEAF / "cgroup.procs").write_text(str(os.getpid()))
    except OSError as error:
        raise NotDelegated(f"cannot move into {base / _OWN_LEAF}: {error.strerror}") from None
    on = {controller for controller in available if _switch_on(ours, controller) and _switch_on(base, controller)}
    probe = base / _OWN_LEAF
    # A file may be missing though its controller is there: memory.swap.max without swap accounting.
    held = {limit for limit, knob in KNOBS.items() if knob.controller in on and (probe / knob.file).exists()}
    return CgroupGroups(base, frozenset(held))


def _switch_on(directory: Path, controller: str) -> bool:
    try:
        (directory / "cgroup.subtree_control").write_text(f"+{controller}")
    except OSError:
        return False  # not delegated to us, or held by a v1 hierarchy
    return True


def _own_cgroup(name: str) -> Path:
    """The directory that we were started in. Raises NotDelegated."""
    path = cgroup_of("self")
    if path is None:
        raise NotDelegated("no cgroup v2 tree is mounted")
    # An earlier life of this process has moved it already.
    return path.parent.parent if path.parts[-2:] == (name, _OWN_LEAF) else path

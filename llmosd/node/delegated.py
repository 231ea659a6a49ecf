"""Groups in a tree of cgroups of our own: a directory below the cgroup that the daemon was started in.

Its leaves are the workers' groups, and the daemon's own where controllers are on, for then no inner node may hold a
process (cgroup-v2.rst, "No Internal Process Constraint"). Cgroups that are not ours are never written to, but for
switching a controller on in the one that we were given.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from llmosd.kernel.spec import Limits
from llmosd.launch.cgroup import cgroup_of
from llmosd.node.cgroups import KNOBS, CgroupGroup
from llmosd.node.groups import Group
from llmosd.node.marked import MarkedGroup
from llmosd.node.records import Record

#: Name of the daemon's own leaf.
_OWN_LEAF: Final = "daemon"


class CgroupGroups:
    """Cgroups in a directory of our own."""

    exact = True

    def __init__(self, base: Path, held: frozenset[str] = frozenset()) -> None:
        self.base = base
        self.held = held

    def new(self, worker: str, incarnation: int, mark: str, limits: Limits) -> Group:
        return CgroupGroup(self.base / f"{worker}-{incarnation}", limits, self.held)

    def known(self, record: Record, mark: str) -> Group:
        if not record.cgroup:
            return MarkedGroup(record.pid, record.start_ticks, mark)
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

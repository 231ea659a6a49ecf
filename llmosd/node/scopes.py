"""Groups that are transient scopes of systemd's, in llmos.slice: they outlive the daemon, and `systemctl` shows them.

systemd holds the limits, so a `systemctl daemon-reload` takes none away. Killing, freezing and looking go to the
scope's cgroup itself, which no failure of D-Bus can keep from us.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any, Final

from dbus_fast import Variant

from llmosd.kernel.spec import Limits
from llmosd.kernel.units import CpuSet
from llmosd.launch.cgroup import cgroup_of
from llmosd.node.cgroups import CgroupGroup, changed
from llmosd.node.devices import usable_cpus
from llmosd.node.groups import Group, marks_of
from llmosd.node.marked import MarkedGroup
from llmosd.node.records import Record
from llmosd.node.systemd import Manager, Properties, SystemdError

SLICE: Final = "llmos.slice"
#: What systemd takes for "infinity" and for "not set".
_NONE: Final = 2**64 - 1
#: The version from which systemd ends a scope that lost a process to the OOM killer, unless it is told otherwise.
_OOM_POLICY_SINCE: Final = 251

#: By limit: the property of systemd.resource-control(5).
PROPERTIES: Final = {
    "allowed_cpus": "AllowedCPUs",
    "cpu_weight": "CPUWeight",
    "cpu_quota": "CPUQuotaPerSecUSec",
    "memory_high": "MemoryHigh",
    "memory_max": "MemoryMax",
    "swap_max": "MemorySwapMax",
    "tasks_max": "TasksMax",
    "io_weight": "IOWeight",
}


def properties_of(limits: Limits, names: set[str] | frozenset[str]) -> Properties:
    """The properties that put limits in force; one that is None is lifted."""
    return {PROPERTIES[name]: _variant(name, getattr(limits, name)) for name in sorted(names)}


def _variant(name: str, value: Any) -> Variant:
    if name == "allowed_cpus":
        # To a scope with processes the kernel refuses an empty cpuset: ENOSPC.
        return Variant("ay", _bits(usable_cpus() if value is None else value))
    if value is None:
        return Variant("t", _NONE)
    # A share of one CPU's time as microseconds in a second.
    return Variant("t", round(float(value) * 10_000) if name == "cpu_quota" else int(value))


def _bits(cpus: CpuSet) -> bytes:
    """A set of CPUs as systemd's bus calls want it: a bit for each, the lowest first."""
    mask = sum(1 << cpu for cpu in cpus)
    return mask.to_bytes((mask.bit_length() + 7) // 8, "little")


def unit_name(worker: str, incarnation: int) -> str:
    """The scope of a worker's life. "@" would make it an instance of a template; ":" is in no model's name."""
    return f"llmos-{worker.replace('@', ':')}-{incarnation}.scope"


class ScopeGroup(CgroupGroup):
    """See the module."""

    def __init__(self, manager: Manager, unit: str, path: Path, begins_with: Properties, held: frozenset[str]) -> None:
        super().__init__(path, held=held)
        if path == Path():
            self.cgroup = ""  # until systemd has made it
        self._manager = manager
        self._unit = unit
        self._begins_with = begins_with

    def enter(self, pid: int) -> None:
        self._manager.in_loop(self._manager.start_scope(self._unit, pid, self._begins_with))
        # Where systemd has put it, and not where we think it does.
        if (path := cgroup_of(pid)) is None:
            raise ProcessLookupError(errno.ESRCH, "it was killed while it waited at the gate")
        self._path = path
        self.cgroup = str(self._path)

    def limit(self, limits: Limits, before: Limits | None) -> list[str]:
        names = changed(limits, before) & self.held
        if not names:
            return []
        try:
            self._manager.in_loop(self._manager.set_properties(self._unit, properties_of(limits, names)))
        except SystemdError as error:
            return [f"{', '.join(sorted(names))} could not be changed on {self._unit}: {error}"]
        return []

    def release(self) -> None:
        """systemd removes the cgroup when the last process has left it."""


class ScopeGroups:
    """Makes scopes. `held`: the limits for which systemd has a controller. `daemon`: our own unit, or ""."""

    exact = True

    def __init__(self, manager: Manager, held: frozenset[str], daemon: str, name: str) -> None:
        """`name`: the daemon's on this machine, with which all marks of it begin."""
        self._manager = manager
        self._held = held
        self._daemon = daemon
        self._name = name

    def new(self, worker: str, incarnation: int, mark: str, limits: Limits) -> Group:
        begins_with = self._begins_with(f"llmosd worker {worker}")
        asked = {name for name in self._held if getattr(limits, name) is not None}
        begins_with |= properties_of(limits, asked)
        return ScopeGroup(self._manager, unit_name(worker, incarnation), Path(), begins_with, self._held)

    def set_apart(self, name: str, pid: int) -> None:
        # In the service's own cgroup systemd takes it for left over from an unclean end.
        unit = f"llmos-{name}-{pid}.scope"
        self._manager.in_loop(self._manager.start_scope(unit, pid, self._begins_with(f"llmosd {name}")))

    def _begins_with(self, description: str) -> Properties:
        begins_with: Properties = {
            "Description": Variant("s", description),
            "Slice": Variant("s", SLICE),
            # A scope whose processes are gone is forgotten, however they ended.
            "CollectMode": Variant("s", "inactive-or-failed"),
            # systemd's default is a share of the machine's tasks, which nobody asked for.
            "TasksMax": Variant("t", _NONE),
        }
        if self._daemon.endswith(".service"):
            # Stopping goes the other way round: at a shutdown the daemon ends its workers before systemd would.
            begins_with["Before"] = Variant("as", [self._daemon])
        if self._manager.version >= _OOM_POLICY_SINCE:
            begins_with["OOMPolicy"] = Variant("s", "continue")
        return begins_with

    def known(self, record: Record, mark: str) -> Group:
        if not record.cgroup:
            return MarkedGroup(record.pid, record.start_ticks, mark)
        path = Path(record.cgroup)
        if path.suffix != ".scope":
            return CgroupGroup(path)
        return ScopeGroup(self._manager, path.name, path, {}, self._held)

    def unknown(self, known: set[str]) -> list[tuple[str, Group]]:
        # The slice may have scopes of another daemon's too: whose one is its processes tell.
        found: dict[str, Group] = {}
        for directory, _, files in os.walk(self._slice()):
            if directory.endswith(".scope") and "cgroup.procs" in files:
                group = CgroupGroup(Path(directory))
                for mark in {mark for pid in group.members() for mark in marks_of(pid, self._name)} - known:
                    found[mark] = group
        return list(found.items())

    @staticmethod
    def _slice() -> Path:
        """The slice's cgroup: the system's, or that of the user whose daemon this is."""
        root, uid = Path("/sys/fs/cgroup"), os.geteuid()
        return root / SLICE if uid == 0 else root / f"user.slice/user-{uid}.slice/user@{uid}.service" / SLICE

    def sweep(self) -> None:
        """An empty scope is systemd's to remove."""

    def close(self) -> None:
        self._manager.close()

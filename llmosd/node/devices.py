"""The inventory: CPUs, NUMA nodes, RAM and GPUs that this daemon may use. For the ledger, `llmos devices`, the doctor.

Counts what the process may use, not what the machine has: affinity, cpuset, CPU quota and memory limit of the cgroups
it runs in bound it. Never guesses: what cannot be counted is left out, and a note says why.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil

from llmosd.kernel.cpus import Cpu
from llmosd.kernel.ledger import Capacity
from llmosd.kernel.placement import Gpu
from llmosd.kernel.units import Bytes, CpuSet
from llmosd.node.gpu import Gpus, take_gpus


class NumaNode(msgspec.Struct, frozen=True):
    """A NUMA node. Nodes without CPUs exist: memory expanders and some GPUs."""

    number: int
    #: Those of its CPUs that may be used.
    cpus: CpuSet
    memory_bytes: int


class Inventory(msgspec.Struct, frozen=True):
    """What this daemon may use."""

    cpus: tuple[Cpu, ...]
    numa_nodes: tuple[NumaNode, ...]
    #: RAM, or less where a cgroup bounds it.
    memory_bytes: int
    #: RAM of the whole machine.
    machine_memory_bytes: int
    swap_bytes: int
    gpus: Gpus = Gpus()
    #: CPU time that the cgroups allow in all, in thousandths of a CPU; None: no bound.
    quota_millicpus: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def cpu_set(self) -> CpuSet:
        return CpuSet(cpu.number for cpu in self.cpus)

    @property
    def packages(self) -> int:
        return len({cpu.package for cpu in self.cpus})

    @property
    def cores(self) -> int:
        return len({(cpu.package, cpu.core) if cpu.core >= 0 else cpu.number for cpu in self.cpus})

    @property
    def threads(self) -> int:
        """Hardware threads: as many as CPUs."""
        return len(self.cpus)

    def capacity(self, reserve_memory_bytes: int) -> Capacity:
        """What the ledger may give away. `reserve_memory_bytes` stay with the system and the daemon.

        A GPU that is cut into MIG slices is given away by the slice, never as a whole.
        """
        millicpus = len(self.cpus) * 1000
        if self.quota_millicpus is not None:
            millicpus = min(millicpus, self.quota_millicpus)
        gpus: list[Gpu] = []
        for device in self.gpus.devices:
            parts = device.slices if device.mig_enabled else (device,)
            gpus += [Gpu(part.uuid, part.memory_bytes) for part in parts]
        return Capacity(millicpus, max(0, self.memory_bytes - reserve_memory_bytes), tuple(gpus), self.cpus)


def take_inventory(root: Path = Path("/")) -> Inventory:
    """Count the devices now. `root` is where proc and sys are looked for. May block while a GPU driver loads."""
    notes: list[str] = []
    usable = usable_cpus()
    nodes = _numa_nodes(root, usable, notes)
    node_of = {cpu: node.number for node in nodes for cpu in node.cpus}
    machine = psutil.virtual_memory().total
    limit = memory_limit(root)
    if limit is not None and limit < machine:
        notes.append(f"memory: this cgroup may use {Bytes(limit)} of the machine's {Bytes(machine)}")
    gpus = take_gpus()
    return Inventory(
        cpus=tuple(_cpu(root, number, node_of.get(number, -1)) for number in usable),
        numa_nodes=nodes,
        memory_bytes=machine if limit is None else min(limit, machine),
        machine_memory_bytes=machine,
        swap_bytes=psutil.swap_memory().total,
        gpus=gpus,
        quota_millicpus=cpu_quota_millicpus(root),
        notes=(*notes, *gpus.notes),
    )


def usable_cpus() -> CpuSet:
    """The CPUs of this process. The kernel keeps an affinity within the cgroup's cpuset, so this one call knows both.

    Asked of the main thread: the thread that asks may have been pinned.
    """
    return CpuSet(os.sched_getaffinity(os.getpid()))


def cgroup_directories(root: Path, controller: str) -> Iterator[Path]:
    """This process's cgroup in the hierarchy of `controller` ("" is cgroup v2) and the ones above it, up to the mount.

    cgroups(7), "/proc files"; proc_pid_mountinfo(5) for the fields.
    """
    path = None
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, member_of = line.split(":", 2)
        if controller in controllers.split(","):
            path = Path(member_of)
    if path is None:
        return
    for line in _lines(root / "proc/self/mountinfo"):
        mount, _, kind = line.partition(" - ")
        fields, (fstype, _, options) = mount.split(), kind.split(" ", 2)
        wanted = fstype == "cgroup" and controller in options.split(",") if controller else fstype == "cgroup2"
        if not wanted:
            continue
        # In a container the mount may show a part of the tree only, by the path that the host knows it by.
        mounted, mount_point = Path(fields[3]), root / fields[4].lstrip("/")
        # Above the root of a cgroup namespace it begins with "..": then the mount is all that can be seen.
        inside = path.relative_to(mounted) if path.is_relative_to(mounted) and ".." not in path.parts else Path()
        yield mount_point / inside
        yield from (mount_point / parent for parent in inside.parents)
        return


def memory_limit(root: Path = Path("/")) -> int | None:
    """The least memory limit of the cgroups this process is in, in bytes, or None. In v1, none is a huge number."""
    found = [_number(directory / "memory.max") for directory in cgroup_directories(root, "")]
    found += [_number(directory / "memory.limit_in_bytes") for directory in cgroup_directories(root, "memory")]
    return min((limit for limit in found if limit is not None and limit < 1 << 62), default=None)


def cpu_quota_millicpus(root: Path = Path("/")) -> int | None:
    """The least CPU bandwidth of the cgroups this process is in, in thousandths of a CPU, or None."""
    found: list[int] = []
    for directory in cgroup_directories(root, ""):
        quota, _, period = _text(directory / "cpu.max").partition(" ")
        if quota.isdigit() and period.isdigit():
            found.append(int(quota) * 1000 // int(period))
    for directory in cgroup_directories(root, "cpu"):
        quota_us, period_us = _number(directory / "cpu.cfs_quota_us"), _number(directory / "cpu.cfs_period_us")
        if quota_us is not None and period_us and quota_us > 0:
            found.append(quota_us * 1000 // period_us)
    return min(found, default=None)


def _cpu(root: Path, number: int, numa_node: int) -> Cpu:
    topology = root / f"sys/devices/system/cpu/cpu{number}/topology"
    package, core = _number(topology / "physical_package_id"), _number(topology / "core_id")
    return Cpu(number, -1 if package is None else package, -1 if core is None else core, numa_node)


def _numa_nodes(root: Path, usable: CpuSet, notes: list[str]) -> tuple[NumaNode, ...]:
    directory = root / "sys/devices/system/node"
    online = _text(directory / "online")
    if not online:
        notes.append("NUMA: the kernel shows no nodes (built without CONFIG_NUMA)")
        return ()
    nodes: list[NumaNode] = []
    for number in CpuSet.parse(online):
        cpus = _text(directory / f"node{number}/cpulist")
        memory_kib = 0
        for line in _lines(directory / f"node{number}/meminfo"):
            if "MemTotal:" in line:
                memory_kib = int(line.split()[3])
        mine = CpuSet(set(CpuSet.parse(cpus)) & set(usable)) if cpus else CpuSet()
        nodes.append(NumaNode(number, mine, memory_kib * 1024))
    return tuple(nodes)


def _text(path: Path) -> str:
    """A file of proc, sys or a cgroup, or "" where this kernel does not have it or does not show it to us."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _lines(path: Path) -> list[str]:
    return _text(path).splitlines()


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.removeprefix("-").isdigit() else None

"""The `process` maker: limits without systemd and without a cgroup of one's own, by what any user may do to processes.

Affinity, nice, ionice, RLIMIT_NOFILE and oom_score_adj are the operating system's to enforce. Memory and tasks are
watched: looked at from time to time, so a fast allocation passes the limit before it is seen. Never RLIMIT_AS: CUDA
reserves address space in terabytes. Never RLIMIT_NPROC: it counts a user's processes, not a worker's.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import psutil

from llmosd.kernel.spec import KERNEL_LIMITS, Limits
from llmosd.kernel.units import Bytes, CpuSet
from llmosd.node.confine import Confinement, LaunchSettings, Unenforceable, live
from llmosd.node.devices import usable_cpus
from llmosd.node.usage import Usage

#: include/uapi/linux/capability.h
CAP_SYS_NICE: Final = 23
CAP_SYS_RESOURCE: Final = 24

_ENFORCED: Final = frozenset({"allowed_cpus", "nice", "oom_score_adj", "open_files"})
_WATCHED: Final = frozenset({"memory_max", "tasks_max"})
#: What it would take, for limits that only cgroups can hold.
_NEEDS: Final = {
    "cpu_weight": "needs a cgroup v2 tree with the cpu controller, or systemd; nice is what can be used without",
    "cpu_quota": "needs a cgroup v2 tree with the cpu controller, or systemd; allowed_cpus is what can be used without",
    "memory_high": "needs a cgroup v2 tree with the memory controller, or systemd; memory_max is watched without",
    "swap_max": "needs a cgroup v2 tree with the memory controller, or systemd",
    "gpu_memory_max": "cannot be enforced on this machine; limit the engine by its own options",
}


class ProcessConfinement:
    """Limits by affinity, nice, ionice and rlimits, and by looking."""

    name: Final = "process"

    def __init__(self, cpus: CpuSet | None = None, *, io_weighed: bool | None = None) -> None:
        """`cpus`: those that may be given out. `io_weighed`: whether a disk's scheduler heeds ionice levels. Left out,
        both are asked of this machine."""
        self._cpus = usable_cpus() if cpus is None else cpus
        self._io_weighed = bool(disks_that_weigh()) if io_weighed is None else io_weighed

    def beside(self, held: frozenset[str]) -> Confinement:
        return self

    def check(self, limits: Limits) -> None:
        for limit, reason in _NEEDS.items():
            if getattr(limits, limit) is not None:
                raise Unenforceable(limit, reason)
        if limits.allowed_cpus is not None and (absent := set(limits.allowed_cpus) - set(self._cpus)):
            raise Unenforceable("allowed_cpus", f"names CPUs {CpuSet(absent)}; llmosd may use {self._cpus}")
        if limits.io_weight is not None and not self._io_weighed:
            raise Unenforceable(
                "io_weight",
                "needs systemd or cgroup v2, or a disk with the bfq scheduler: "
                "echo bfq > /sys/block/DISK/queue/scheduler",
            )
        if limits.nice is not None and limits.nice < (least := least_nice()):
            raise Unenforceable("nice", f"of {limits.nice} needs CAP_SYS_NICE; llmosd may set {least} to 19")
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        if limits.open_files is not None and limits.open_files > hard and not has_capability(CAP_SYS_RESOURCE):
            raise Unenforceable(
                "open_files", f"of {limits.open_files} is above llmosd's own hard limit of {hard}; raise LimitNOFILE="
            )  # fmt: skip
        own = live.oom_score_adj(os.getpid())
        if limits.oom_score_adj is not None and limits.oom_score_adj < own and not has_capability(CAP_SYS_RESOURCE):
            raise Unenforceable(
                "oom_score_adj", f"of {limits.oom_score_adj} needs CAP_SYS_RESOURCE; llmosd's own value is {own}"
            )

    def enforcement(self, limit: str) -> str:
        if limit in KERNEL_LIMITS:
            return "llmosd"
        if limit in _WATCHED:
            return "watched"
        return self.name if limit in _ENFORCED or (limit == "io_weight" and self._io_weighed) else ""

    def launch_settings(self, limits: Limits) -> LaunchSettings:
        return LaunchSettings(
            cpu_affinity=None if limits.allowed_cpus is None else tuple(limits.allowed_cpus),
            nice=limits.nice,
            ionice=None if limits.io_weight is None else ionice_of(limits.io_weight),
            rlimits={} if limits.open_files is None else {"NOFILE": (limits.open_files, limits.open_files)},
            oom_score_adj=limits.oom_score_adj,
        )

    def apply(self, pids: Sequence[int], limits: Limits, before: Limits | None = None) -> list[str]:
        base = Limits() if before is None else before
        changed = {name for name in limits.__struct_fields__ if getattr(limits, name) != getattr(base, name)}
        return live.change_tree(pids, self._steps(pids[0], limits, changed)) if pids else []

    def over_limit(self, limits: Limits, usage: Usage) -> str:
        if limits.memory_max is not None and usage.memory_bytes > limits.memory_max:
            used = Bytes(usage.memory_bytes)
            return f"uses {used} of anonymous and shared memory; memory_max is {limits.memory_max}"
        if limits.tasks_max is not None and usage.threads > limits.tasks_max:
            return f"has {usage.threads} threads in {usage.processes} processes; tasks_max is {limits.tasks_max}"
        return ""

    def _steps(self, leader: int, limits: Limits, changed: set[str]) -> list[live.Step]:
        """What has to be done for `changed`. A limit that became None goes back to the daemon's own value."""
        steps: list[live.Step] = []
        if "allowed_cpus" in changed:
            cpus = self._cpus if limits.allowed_cpus is None else limits.allowed_cpus
            steps.append(live.Step("allowed_cpus", live.set_affinity(cpus), True, "the process is another user's"))
        if "nice" in changed:
            nice = os.getpriority(os.PRIO_PROCESS, os.getpid()) if limits.nice is None else limits.nice
            advice = "lowering it needs CAP_SYS_NICE; restart the worker"
            steps.append(live.Step("nice", live.set_nice(nice), True, advice))
            if live.autogroups_count():
                steps.append(live.Step("nice of the session", live.set_session_nice(nice), False, advice))
        if "io_weight" in changed:
            ionice = (int(psutil.IOPRIO_CLASS_NONE), 0) if limits.io_weight is None else ionice_of(limits.io_weight)
            steps.append(live.Step("io_weight", live.set_ionice(*ionice), True, "the process is another user's"))
        if "open_files" in changed:
            own = resource.getrlimit(resource.RLIMIT_NOFILE)
            soft, hard = own if limits.open_files is None else (limits.open_files, limits.open_files)
            advice = "raising it needs CAP_SYS_RESOURCE; restart the worker"
            steps.append(live.Step("open_files", live.set_open_files(soft, hard), False, advice))
        if "oom_score_adj" in changed:
            score = live.oom_score_adj(os.getpid()) if limits.oom_score_adj is None else limits.oom_score_adj
            advice = "lowering it needs CAP_SYS_RESOURCE; restart the worker"
            steps.append(live.Step("oom_score_adj", live.set_oom_score_adj(score, leader), False, advice))
        return steps


def ionice_of(io_weight: int) -> tuple[int, int]:
    """The best-effort level for a weight, by the weights that bfq gives to levels: 8 - level, so that the normal
    weight, 100, is the normal level, 4 (block/bfq-iosched.c, bfq_ioprio_to_weight). 200 and more is level 0."""
    return int(psutil.IOPRIO_CLASS_BE), min(7, max(0, 8 - round(io_weight * 4 / 100)))


def disks_that_weigh(root: Path = Path("/")) -> list[str]:
    """The disks whose scheduler shares time by ionice level: only bfq does, mq-deadline knows no more than classes."""
    disks: list[str] = []
    for path in sorted(root.glob("sys/block/*/queue/scheduler")):
        try:
            if "[bfq]" in path.read_text() and (path.parent.parent / "device").exists():
                disks.append(path.parent.parent.name)
        except OSError:
            continue  # unplugged meanwhile
    return disks


def least_nice() -> int:
    """The lowest nice value that this process may give: setpriority(2), getrlimit(2) on RLIMIT_NICE."""
    if has_capability(CAP_SYS_NICE):
        return -20
    ceiling = resource.getrlimit(resource.RLIMIT_NICE)[0]
    allowed = -20 if ceiling == resource.RLIM_INFINITY else 20 - ceiling
    return min(os.getpriority(os.PRIO_PROCESS, os.getpid()), max(-20, allowed))


def has_capability(number: int) -> bool:
    """Whether this process has a capability that counts. In a user namespace of its own it only looks so."""
    uid_map = Path("/proc/self/uid_map").read_text().split()
    if uid_map != ["0", "0", "4294967295"]:
        return False
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> number & 1)
    return False

"""What a worker's process tree uses: CPU time, memory, processes, threads. For `llmos ps` and the memory watchdog.

Reads /proc only and changes nothing. A process that vanishes while it is read counts as gone.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
_PROC: Final = Path("/proc")


class ProcessId(NamedTuple):
    """A process for certain: ids are used again, ids with start times are not."""

    pid: int
    #: Clock ticks since boot.
    started_ticks: int


class Usage(msgspec.Struct, frozen=True):
    """A process tree at one moment."""

    #: CPU time, user and system, of the processes that live; it falls when one of them ends.
    cpu_s: float = 0.0
    #: Anonymous and shared memory: what cannot be dropped. Mapped files, such as weights, are cache and do not count.
    memory_bytes: int = 0
    #: Everything in RAM, mapped files included.
    resident_bytes: int = 0
    processes: int = 0
    threads: int = 0
    #: CPU seconds of each process.
    cpu_by_process: dict[ProcessId, float] = {}
    #: When this was read, in clock ticks since boot, like `ProcessId.started_ticks`.
    taken_ticks: int = 0


def sample(pids: Iterable[int], *, exact: bool = False) -> Usage:
    """What these processes use now.

    Memory that several of them share is counted once for each, so the sum is an upper bound. `exact` shares it out
    between them (PSS): that walks their page tables, so it is for a second look before acting on the bound.
    """
    taken_ticks = int(time.clock_gettime(time.CLOCK_BOOTTIME) * _TICKS_PER_S)
    memory = resident = threads = 0
    cpu: dict[ProcessId, float] = {}
    for pid in set(pids):
        directory = _PROC / str(pid)
        try:
            process, cpu_s, thread_count = _read_stat(directory)
            sizes = _sizes(directory / "status")
            bound = sizes.get("RssAnon", 0) + sizes.get("RssShmem", 0)
            memory += _proportional(directory, bound) if exact else bound
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended
        cpu[process] = cpu_s
        resident += sizes.get("VmRSS", 0)
        threads += thread_count
    return Usage(sum(cpu.values()), memory, resident, len(cpu), threads, cpu, taken_ticks)


class CpuMeter:
    """CPU percent of a process tree, from one sample to the next: 100 is one CPU busy.

    Processes may come and go in between. One that came counts from its start; what one that went used since the last
    sample is lost. An old process that is seen for the first time does not count yet: it used its CPU time before.
    """

    def __init__(self) -> None:
        self._last: Usage | None = None
        self._last_at = 0.0
        self._percent = 0.0

    def update(self, usage: Usage, now: float) -> float:
        """The percentage since the last call; 0 at the first. `now` is in monotonic seconds."""
        last, elapsed_s = self._last, now - self._last_at
        if last is None:
            self._last, self._last_at = usage, now
        elif elapsed_s > 0:
            self._percent = 100 * _cpu_between(last, usage) / elapsed_s
            self._last, self._last_at = usage, now
        return self._percent


def _cpu_between(before: Usage, after: Usage) -> float:
    """CPU seconds that the processes of `after` used since `before`."""
    total = 0.0
    for process, cpu_s in after.cpu_by_process.items():
        if process in before.cpu_by_process:
            total += max(0.0, cpu_s - before.cpu_by_process[process])
        elif process.started_ticks >= before.taken_ticks:
            total += cpu_s
    return total


def _read_stat(directory: Path) -> tuple[ProcessId, float, int]:
    """(process, CPU seconds, threads). The name in parentheses may hold spaces and parentheses: proc_pid_stat(5)."""
    text = (directory / "stat").read_text(errors="replace")
    fields = text[text.rindex(")") + 2 :].split()
    # `fields` begins with the manual's field 3
    cpu_s = (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
    return ProcessId(int(directory.name), int(fields[19])), cpu_s, int(fields[17])


def _sizes(path: Path) -> dict[str, int]:
    """Lines such as `RssAnon:  112 kB`, in bytes. A zombie has none."""
    sizes: dict[str, int] = {}
    for line in path.read_text(errors="replace").splitlines():
        name, _, value = line.partition(":")
        if value.endswith(" kB"):
            sizes[name] = int(value.split()[0]) * 1024
    return sizes


def _proportional(directory: Path, bound: int) -> int:
    """Like `bound`, with what is shared divided by its users; `bound` itself where we may not look (ptrace(2))."""
    if bound == 0:
        return 0  # a zombie, say, has no smaps
    try:
        sizes = _sizes(directory / "smaps_rollup")
    except PermissionError:
        return bound
    # Not below 5.3, the kernel that told them apart: there the bound stands.
    if "Pss_Anon" not in sizes:
        return bound
    return sizes["Pss_Anon"] + sizes.get("Pss_Shmem", 0)

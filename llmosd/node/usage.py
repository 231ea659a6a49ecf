"""What a worker's process tree uses: CPU time, memory, processes, threads. For `llmos ps` and the memory watchdog.

Reads /proc only and changes nothing. A process that vanishes while it is read counts as gone.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from typing import Final, NamedTuple

import msgspec

from llmosd.node.processes import read

_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")


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
        try:
            process, cpu_s, thread_count = _read_stat(pid)
            sizes = _sizes(f"/proc/{pid}/status", b"VmRSS:", b"RssAnon:", b"RssShmem:")
            bound = sizes[b"RssAnon:"] + sizes[b"RssShmem:"]
            memory += _proportional(pid, bound) if exact else bound
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended
        cpu[process] = cpu_s
        resident += sizes[b"VmRSS:"]
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


def _read_stat(pid: int) -> tuple[ProcessId, float, int]:
    """(process, CPU seconds, threads). The name in parentheses may hold spaces and parentheses: proc_pid_stat(5)."""
    line = read(f"/proc/{pid}/stat")
    # From the manual's field 3 on.
    fields = line[line.rindex(b")") + 2 :].split(None, 20)
    cpu_s = (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
    return ProcessId(pid, int(fields[19])), cpu_s, int(fields[17])


def _sizes(path: str, *names: bytes) -> dict[bytes, int]:
    """Lines such as `RssAnon:  112 kB`, in bytes; 0 for one that is not there. A zombie has none."""
    text = read(path)
    sizes = {}
    for name in names:
        at = text.find(b"\n" + name)
        sizes[name] = int(text[at + len(name) + 1 :].split(None, 1)[0]) * 1024 if at >= 0 else 0
    return sizes


def _proportional(pid: int, bound: int) -> int:
    """Like `bound`, with what is shared divided by its users; `bound` itself where we may not look (ptrace(2))."""
    if bound == 0:
        return 0  # a zombie, say, has no smaps
    try:
        sizes = _sizes(f"/proc/{pid}/smaps_rollup", b"Pss_Anon:", b"Pss_Shmem:")
    except PermissionError:
        return bound
    # Not below 5.3, the kernel that told them apart: there the bound stands.
    return sum(sizes.values()) or bound

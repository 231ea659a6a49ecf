"""What the kernel counts of a cgroup as a whole: CPU time, throttling, memory, tasks, stalls. For groups.

Reads interface files of cgroup v2 (cgroup-v2.rst) and changes nothing. Without a controller its files are not there,
and its figures stay None.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec

from llmosd.launch.cgroup import pairs

_RESOURCES: Final = ("cpu", "memory", "io")


class Counters(msgspec.Struct, frozen=True):
    """A cgroup at one moment. None: nobody counts it here."""

    #: CPU time of all processes, those that ended among them.
    cpu_s: float | None = None
    #: Time in which cpu_quota held its tasks back.
    throttled_s: float | None = None
    #: With page cache, unlike what `usage` measures.
    memory_bytes: int | None = None
    memory_peak_bytes: int | None = None
    swap_bytes: int | None = None
    swap_peak_bytes: int | None = None
    tasks: int | None = None
    tasks_peak: int | None = None
    #: How often memory_high was passed, and processes that the OOM killer took.
    over_high: int = 0
    oom_kills: int = 0
    #: Share of the last ten seconds in which some task waited for a resource (Documentation/accounting/psi.rst).
    stalled: dict[str, float] = {}


def read(cgroup: Path) -> Counters:
    """What is counted now. A cgroup that is gone has counted nothing."""
    cpu, events = pairs(cgroup / "cpu.stat"), pairs(cgroup / "memory.events")
    return Counters(
        cpu_s=_seconds(cpu, "usage_usec"),
        throttled_s=_seconds(cpu, "throttled_usec"),
        memory_bytes=_number(cgroup / "memory.current"),
        memory_peak_bytes=_number(cgroup / "memory.peak"),
        swap_bytes=_number(cgroup / "memory.swap.current"),
        swap_peak_bytes=_number(cgroup / "memory.swap.peak"),
        tasks=_number(cgroup / "pids.current"),
        tasks_peak=_number(cgroup / "pids.peak"),
        over_high=events.get("high", 0),
        oom_kills=events.get("oom_kill", 0),
        stalled={name: share for name in _RESOURCES if (share := _stalled(cgroup / f"{name}.pressure")) is not None},
    )


def _seconds(counts: dict[str, int], name: str) -> float | None:
    return counts[name] / 1e6 if name in counts else None


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def _stalled(path: Path) -> float | None:
    """The share in a line such as `some avg10=1.25 avg60=…`."""
    for line in _text(path).splitlines():
        kind, *fields = line.split()
        if kind == "some":
            return float(fields[0].removeprefix("avg10=")) / 100
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""  # no such controller, or the cgroup is gone

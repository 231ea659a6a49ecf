"""CPU time, medians with their spread, arms that take turns, and tables: what all benchmarks have in common."""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

T = TypeVar("T")
K = TypeVar("K")


class Cpu(msgspec.Struct, frozen=True):
    """CPU seconds of a process: of all its threads, and of the one that used the most."""

    total: float
    busiest: float


def cpu_of(pid: int) -> dict[int, float]:
    """CPU seconds that each thread of a process has used: /proc/PID/task/TID/schedstat, in nanoseconds."""
    used = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            used[int(task.name)] = int((task / "schedstat").read_text().split()[0]) / 1e9
        except OSError:
            continue  # that thread has just ended
    return used


def cpu_between(before: Mapping[int, float], after: Mapping[int, float]) -> Cpu:
    spans = [used - before.get(thread, 0.0) for thread, used in after.items()]
    return Cpu(sum(spans), max(spans, default=0.0))


class Spread(msgspec.Struct, frozen=True):
    """A median, and the range it comes from."""

    median: float
    low: float
    high: float

    def show(self, digits: int = 0, unit: str = "") -> str:
        return f"{self.median:,.{digits}f}{unit} ({self.low:,.{digits}f} to {self.high:,.{digits}f})"


def spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


def ratio(over: Sequence[float], under: Sequence[float]) -> Spread:
    """Of neighbours in time: what disturbed one round disturbed both of its halves."""
    return spread([a / b for a, b in zip(over, under, strict=True)])


def take_turns(arms: Mapping[K, Callable[[], T]], rounds: int) -> dict[K, list[T]]:
    """Each arm once, then each again: A B A B …"""
    results: dict[K, list[T]] = {name: [] for name in arms}
    for number in range(rounds):
        for name, measure in arms.items():
            progress(f"{' '.join(name) if isinstance(name, tuple) else name}, round {number + 1} of {rounds}")
            results[name].append(measure())
    progress("")
    return results


def progress(what: str) -> None:
    """Say what is being done, on a terminal only."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{what}")
        sys.stderr.flush()


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a Markdown table."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    print(f"\n### {title}\n")
    for line in lines:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |")
    sys.stdout.flush()


def this_machine() -> str:
    system = os.uname()
    load = os.getloadavg()[0]
    python = ".".join(map(str, sys.version_info[:3]))
    return f"{os.cpu_count()} cores, Linux {system.release}, Python {python}; load at the start {load:.1f}"

"""Processes of ours that no record names, found when a daemon starts, and ended before their worker is started again.

A damaged record leaves such, and so does a crash between making a group and recording it. What is in a cgroup of ours
is ours, for nobody else makes any there. Without cgroups it is ours if it carries our mark, which names our runtime
directory: whatever a worker starts inherits that and ends with it. Where there are cgroups a mark alone proves nothing:
its process was moved elsewhere by somebody who may, as systemd moves a terminal's server, and is left alone.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

from llmosd.node.groups import MARK, CgroupGroup, Group, Groups, MarkedGroup
from llmosd.node.records import start_ticks

#: Seconds that a starting daemon waits for strays to go.
GONE_WITHIN_S: Final = 10.0
#: Seconds between two SIGKILLs to those that do not go.
KILL_AGAIN_S: Final = 2.0


class Stray(NamedTuple):
    """A group that no record names."""

    worker: str
    group: Group
    pids: list[int]


def find(groups: Groups, known: set[str]) -> list[Stray]:
    """Groups of ours that have processes and are not `known`, which holds the marks of those on record."""
    if groups.cgroup_base is not None:
        found = _cgroups(groups.cgroup_base, groups.name, known)
    else:
        found = _marked(groups.name, known)
    return [Stray(worker, group, pids) for worker, group in found if (pids := group.members())]


def _cgroups(base: Path, name: str, known: set[str]) -> list[tuple[str, Group]]:
    found: list[tuple[str, Group]] = []
    for path in base.glob("*/"):
        mark = f"{name}/{path.name}"
        if mark not in known and (worker := _worker(mark)):
            found.append((worker, CgroupGroup(path)))
    return found


def _marked(name: str, known: set[str]) -> list[tuple[str, Group]]:
    prefix = f"{MARK}={name}/".encode()
    ours = _marks(os.getpid(), prefix)
    leaders: dict[str, tuple[int, int]] = {}
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        pid = int(entry.name)
        for mark in _marks(pid, prefix) - known - ours:  # ours: we were started by what a worker left, and live in it
            if (ticks := start_ticks(pid)) is not None:
                # The oldest leads: the others descend from it, or it is gone.
                leaders[mark] = min(leaders.get(mark, (ticks, pid)), (ticks, pid))
    return [
        (worker, MarkedGroup(pid, ticks, mark)) for mark, (ticks, pid) in leaders.items() if (worker := _worker(mark))
    ]


def _marks(pid: int, prefix: bytes) -> set[str]:
    """The marks of ours in a process's first environment: one, or none."""
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return set()  # it ended while we looked, or is not ours to look at
    return {
        variable.partition(b"=")[2].decode(errors="replace") for variable in variables if variable.startswith(prefix)
    }


def _worker(mark: str) -> str:
    """Which worker a mark is of; empty if it is of none."""
    worker, _, incarnation = mark.rpartition("/")[2].rpartition("-")
    return worker if incarnation.isdigit() else ""


class Strays:
    """Ends them. `warn` tells people: (worker, sentence)."""

    def __init__(
        self, groups: Groups, warn: Callable[[str, str], None], in_thread: Callable[[Callable[[], Any]], Awaitable[Any]]
    ) -> None:
        self._groups = groups
        self._warn = warn
        self._in_thread = in_thread
        self._going: dict[asyncio.Task[None], str] = {}

    async def end(self, known: set[str]) -> None:
        """Find and kill them; returns once they are gone, or after GONE_WITHIN_S. `known`: as for `find`."""
        for stray in await self._in_thread(lambda: find(self._groups, known)):
            pids = ", ".join(map(str, stray.pids))
            self._warn(stray.worker, f"its processes {pids} are on no record, and are killed")
            self._going[asyncio.create_task(self._kill(stray.group))] = stray.worker
        if self._going:
            await asyncio.wait(self._going, timeout=GONE_WITHIN_S)
        for task, worker in self._going.items():
            if not task.done():
                self._warn(worker, "these processes were killed and do not go; it cannot start before they have")

    async def _kill(self, group: Group) -> None:
        while True:
            await self._in_thread(group.kill)
            if await self._in_thread(lambda: group.wait_empty(KILL_AGAIN_S)):
                break
        await self._in_thread(group.release)

    async def gone(self, worker: str) -> None:
        """Wait until none is left of a worker: before that, it would be there twice."""
        if tasks := [task for task, whose in self._going.items() if whose == worker]:
            await asyncio.wait(tasks)

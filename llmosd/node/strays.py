"""Processes of ours that no record names, found when a daemon starts, and ended before their worker is started again.

A damaged record leaves such, and so does a crash between making a group and recording it. What is in a cgroup of ours
is ours, for nobody else makes any there. Without cgroups it is ours if it carries our mark, which names our runtime
directory: whatever a worker starts inherits that and ends with it. Where there are cgroups a mark alone proves nothing:
its process was moved elsewhere by somebody who may, as systemd moves a terminal's server, and is left alone. Which
groups are ours each kind of them knows itself (`Groups.unknown`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final

from llmosd.node.groups import Group, Groups, worker_of

#: Seconds that a starting daemon waits for strays to go.
GONE_WITHIN_S: Final = 10.0
#: Seconds between two SIGKILLs to those that do not go.
KILL_AGAIN_S: Final = 2.0


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
        """Find and kill them; returns once they are gone, or after GONE_WITHIN_S.

        `known`: the marks of those on record.
        """
        for worker, group, pids in await self._in_thread(lambda: self._find(known)):
            self._warn(worker, f"its processes {', '.join(map(str, pids))} are on no record, and are killed")
            self._going[asyncio.create_task(self._kill(group))] = worker
        if self._going:
            await asyncio.wait(self._going, timeout=GONE_WITHIN_S)
        for task, worker in self._going.items():
            if not task.done():
                self._warn(worker, "these processes were killed and do not go; it cannot start before they have")

    def _find(self, known: set[str]) -> list[tuple[str, Group, list[int]]]:
        found = [(worker_of(mark), group, group.members()) for mark, group in self._groups.unknown(known)]
        return [(worker, group, pids) for worker, group, pids in found if worker and pids]

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

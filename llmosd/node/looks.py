"""When the node looks at which worker: at those in whose group anything ran since it looked before.

A group in which nothing ran uses what it used. So a worker that wakes up is seen at the next look, like any other, and
a thousand that sleep cost next to nothing. What tells is as exact as the figures that depend on it: of a cgroup its CPU
time, in microseconds and with the processes that ended; elsewhere the lines of /proc/PID/stat of all its processes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from llmosd.kernel.spec import Limits
from llmosd.node.life import Life
from llmosd.node.marked import MarkedGroup
from llmosd.node.processes import Processes

#: Seconds after which even a still worker is looked at: its memory may have been swapped out, a process moved to it.
STILL_S: Final = 60.0
_STAT_BYTES: Final = 4096


class Due(NamedTuple):
    """A worker to look at."""

    life: Life
    #: Its processes, if they are known already.
    members: Sequence[int] | None


class _Known:
    """What was seen of one worker's life."""

    __slots__ = ("fd", "limits", "look_at", "moved", "sign")

    def __init__(self) -> None:
        #: Of its cgroup's cpu.stat, kept open: to open it costs more than to read it.
        self.fd = -1
        #: What changes when anything runs.
        self.sign: object = None
        #: Whether it had changed at the look before.
        self.moved = True
        self.limits: Limits | None = None
        #: In monotonic seconds, if nothing changes.
        self.look_at = 0.0


class Looks:
    """See the module. Blocks; to be used by one thread at a time."""

    def __init__(self) -> None:
        self._known: dict[Life, _Known] = {}
        self._processes = Processes()

    def due(self, lives: Sequence[Life], limits: Mapping[str, Limits]) -> list[Due]:
        """Which of these, which are all there are, are worth a look now. `limits`: in force, by worker."""
        before, self._known = self._known, {}
        members = self._members(lives)
        now = time.monotonic()
        due = []
        for life in lives:
            known = self._known[life] = before.pop(life) if life in before else _Known()
            sign = members[life] if life in members else _cpu_time(known, life.group.cgroup)
            moved = sign is None or sign != known.sign
            # Once more after it came to rest, for its CPU percentage to become 0. New limits must find what it uses.
            if moved or known.moved or limits.get(life.worker) is not known.limits or now >= known.look_at:
                due.append(Due(life, list(members[life]) if life in members else None))
                known.look_at = now + STILL_S
            known.sign, known.moved, known.limits = sign, moved, limits.get(life.worker)
        for known in before.values():
            if known.fd >= 0:
                os.close(known.fd)
        return due

    def _members(self, lives: Sequence[Life]) -> dict[Life, dict[int, bytes]]:
        """The processes of the groups that no cgroup holds."""
        groups = [(life, life.group) for life in lives]
        marked = [(life, group) for life, group in groups if isinstance(group, MarkedGroup)]
        if not marked:
            return {}
        found = self._processes.read([group.claim for _, group in marked])
        return {life: processes for (life, _), processes in zip(marked, found, strict=True)}


def _cpu_time(known: _Known, cgroup: str) -> bytes | None:
    """The CPU time of everything in a cgroup, as the kernel writes it; None: it cannot be told."""
    try:
        if known.fd < 0:
            known.fd = os.open(f"{cgroup}/cpu.stat", os.O_RDONLY | os.O_CLOEXEC)
        return os.pread(known.fd, _STAT_BYTES, 0)
    except OSError:
        return None  # just gone; or before Linux 4.15, where it takes the cpu controller

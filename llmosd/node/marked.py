"""Groups where there is no cgroup to hold a process: found by its ancestors, its session, and a mark it was born with.

A process can shed all three with some effort; it then becomes the daemon's child when its leader ends, and the node's
regular look ends it.
"""

from __future__ import annotations

import os
import select
import signal
import time
from pathlib import Path
from typing import Final

from llmosd.kernel.spec import Limits
from llmosd.node.cgroups import CgroupGroup
from llmosd.node.counters import Counters
from llmosd.node.groups import MARK, Group, marks_of, signal_process
from llmosd.node.processes import Claim, Processes
from llmosd.node.records import Record, start_ticks

#: Milliseconds between two looks for processes that appeared while their group was being killed.
_LOOK_AGAIN_MS: Final = 50
#: Looks for processes that were forked while their group was being stopped.
_STOP_ROUNDS: Final = 50


class MarkedGroup:
    """A group found by ancestry, session and mark, where there is no cgroup to hold it."""

    cgroup = ""
    held: frozenset[str] = frozenset()
    exact = False

    def __init__(self, leader: int, leader_ticks: int, mark: str) -> None:
        """`leader_ticks`: when the leader started. Once it is gone, its number may come to mean a stranger."""
        self.claim = Claim(leader, leader_ticks, f"{MARK}={mark}".encode())

    def enter(self, pid: int) -> None:
        self.claim = Claim(pid, start_ticks(pid) or 0, self.claim.mark)

    def limit(self, limits: Limits, before: Limits | None) -> list[str]:
        return []  # each process has its own

    def counters(self) -> Counters:
        return Counters()  # nobody counts them together

    def members(self) -> list[int]:
        return sorted(Processes().read([self.claim])[0])

    def kill(self) -> None:
        # Stopped first, until a look finds nobody new: what is killed one by one could fork faster than that.
        stopped: set[int] = set()
        for _ in range(_STOP_ROUNDS):
            new = set(self.members()) - stopped
            if not new:
                break
            for pid in new:
                signal_process(pid, signal.SIGSTOP)
            stopped |= new
        for pid in self.members():
            signal_process(pid, signal.SIGKILL)

    def wait_empty(self, timeout: float) -> bool:
        deadline = time.monotonic() + timeout
        while members := self.members():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            poll = select.poll()
            fds = []
            for pid in members:
                try:
                    fds.append(os.pidfd_open(pid))
                    poll.register(fds[-1], select.POLLIN)
                except OSError:
                    continue  # gone meanwhile
            poll.poll(min(left * 1000, _LOOK_AGAIN_MS))
            for fd in fds:
                os.close(fd)
        return True

    def freeze(self, frozen: bool) -> None:
        for pid in self.members():
            signal_process(pid, signal.SIGSTOP if frozen else signal.SIGCONT)

    def is_frozen(self) -> bool:
        try:
            return Path(f"/proc/{self.claim.leader}/stat").read_bytes().rpartition(b")")[2].split()[0] == b"T"
        except OSError:
            return False

    def release(self) -> None:
        """Nothing is left of it."""


class MarkedGroups:
    """See the module."""

    exact = False

    def __init__(self, daemon: str) -> None:
        """`daemon`: its name on this machine, with which all marks of it begin."""
        self._daemon = daemon

    def new(self, worker: str, incarnation: int, mark: str, limits: Limits) -> Group:
        return MarkedGroup(0, 0, mark)

    def known(self, record: Record, mark: str) -> Group:
        if record.cgroup:  # made by a daemon that could
            return CgroupGroup(Path(record.cgroup))
        return MarkedGroup(record.pid, record.start_ticks, mark)

    def unknown(self, known: set[str]) -> list[tuple[str, Group]]:
        ours = marks_of(os.getpid(), self._daemon)  # we were started by what a worker left, and live in it
        leaders: dict[str, tuple[int, int]] = {}
        for entry in os.scandir("/proc"):
            if not entry.name.isdigit():
                continue
            pid = int(entry.name)
            for mark in marks_of(pid, self._daemon) - known - ours:
                if (ticks := start_ticks(pid)) is not None:
                    # The oldest leads: the others descend from it, or it is gone.
                    leaders[mark] = min(leaders.get(mark, (ticks, pid)), (ticks, pid))
        return [(mark, MarkedGroup(pid, ticks, mark)) for mark, (ticks, pid) in leaders.items()]

    def set_apart(self, name: str, pid: int) -> None:
        """Nobody here ends what is in the daemon's own cgroup."""

    def sweep(self) -> None:
        """Nothing is left of them."""

    def close(self) -> None:
        """Nothing is held."""

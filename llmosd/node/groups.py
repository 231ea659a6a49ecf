"""A worker's process group: everything that descends from its leader. Killed whole, and seen to be empty.

By the strongest means there is: a scope of systemd's (`scopes.py`), a cgroup of our own (`cgroups.py`), or, where no
cgroup holds a process, what it cannot easily shed (`marked.py`). A group also holds those limits that the kernel keeps
for processes together. All methods may block; the node calls them in a thread.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Final, Protocol

from llmosd.kernel.spec import Limits
from llmosd.node.counters import Counters
from llmosd.node.records import Record, start_ticks

#: Name of the environment variable that marks every process of a group.
MARK: Final = "LLMOSD_GROUP"


def mark_of(daemon: str, worker: str, incarnation: int) -> str:
    """The value of MARK for a worker's life: unique on this machine."""
    return f"{daemon}/{worker}-{incarnation}"


def worker_of(mark: str) -> str:
    """Which worker a mark is of; empty if it is of none."""
    worker, _, incarnation = mark.rpartition("/")[2].rpartition("-")
    return worker if incarnation.isdigit() else ""


def marks_of(pid: int, daemon: str) -> set[str]:
    """A daemon's marks in a process's first environment: one, or none."""
    prefix = f"{MARK}={daemon}/".encode()
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return set()  # it ended while we looked, or is not ours to look at
    found = (variable for variable in variables if variable.startswith(prefix))
    return {variable.partition(b"=")[2].decode(errors="replace") for variable in found}


class Group(Protocol):
    """A worker's processes."""

    #: Path of the cgroup; empty where there is none, or not yet.
    cgroup: str
    #: The limits that it holds: others are somebody else's to see to.
    held: frozenset[str]
    #: No process can leave it, whatever it does.
    exact: bool

    def enter(self, pid: int) -> None:
        """Put the leader in, before it runs its program, with the limits that the group holds. Raises OSError."""

    def limit(self, limits: Limits, before: Limits | None) -> list[str]:
        """Change the limits that the group holds. `before`: those in force until now; None: nobody knows.

        Answers what could not be done, as sentences.
        """

    def counters(self) -> Counters:
        """What the kernel counts of the group as a whole."""

    def members(self) -> list[int]: ...

    def kill(self) -> None:
        """SIGKILL to all."""

    def wait_empty(self, timeout: float) -> bool:
        """Wait for at most `timeout` seconds until no process is left."""

    def freeze(self, frozen: bool) -> None:
        """Stop all, or let all go on. Raises OSError."""

    def is_frozen(self) -> bool: ...

    def release(self) -> None:
        """Clean up after an empty group."""


class Groups(Protocol):
    """Makes groups of one kind."""

    #: No process can leave its group, whatever it does.
    exact: bool

    def new(self, worker: str, incarnation: int, mark: str, limits: Limits) -> Group:
        """A group for a worker that is about to be spawned. `mark`: as in its environment."""

    def known(self, record: Record, mark: str) -> Group:
        """The group of a worker that was alive before the daemon was, of whatever kind it was made."""

    def unknown(self, known: set[str]) -> list[tuple[str, Group]]:
        """Groups of this daemon's that are there, by their mark, without those that are `known`."""

    def set_apart(self, name: str, pid: int) -> None:
        """Put a process of the daemon's own where it is not taken for a part of it: it outlives it. Raises OSError."""

    def sweep(self) -> None:
        """Remove what an earlier daemon left empty: a crash between making a group and recording it does that."""

    def close(self) -> None:
        """Let go; the workers live on."""


def signal_process(pid: int, number: int) -> None:
    """Signal a process that was just found; never another one that got its number meanwhile."""
    try:
        started = start_ticks(pid)
        fd = os.pidfd_open(pid)
        try:
            if started is not None and start_ticks(pid) == started:
                signal.pidfd_send_signal(fd, number)
        finally:
            os.close(fd)
    except (ProcessLookupError, PermissionError):
        pass  # it has just ended by itself; or it became another user's, and its group will be seen not to get empty

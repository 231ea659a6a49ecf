"""A worker's process group: everything that descends from its leader. Killed whole, and seen to be empty.

Where a cgroup v2 tree is writable, a group is a cgroup: exact, killed in one write, its end announced. Elsewhere it
is found by what a process cannot easily shed: its ancestors, its session, and a mark in its first environment.
All methods may block; the node calls them in a thread.
"""

from __future__ import annotations

import os
import select
import signal
import time
from pathlib import Path
from typing import Final, Protocol

from llmosd.node.records import Record, start_ticks

#: Name of the environment variable that marks every process of a group.
MARK: Final = "LLMOSD_GROUP"
#: Milliseconds between two looks for processes that appeared while their group was being killed.
_LOOK_AGAIN_MS: Final = 50
#: Looks for processes that were forked while their group was being stopped.
_STOP_ROUNDS: Final = 50


class Group(Protocol):
    """A worker's processes."""

    #: Path of the cgroup; empty where there is none.
    cgroup: str

    def enter(self, pid: int) -> None:
        """Put the leader in, before it runs its program. Raises OSError."""

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


class CgroupGroup:
    """A group that is a cgroup (v2). Needs no controller."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.cgroup = str(path)

    def enter(self, pid: int) -> None:
        self._path.mkdir(exist_ok=True)
        (self._path / "cgroup.procs").write_text(str(pid))

    def members(self) -> list[int]:
        pids = []
        # An engine may make cgroups of its own below.
        for directory in self._directories():
            try:
                pids += [int(line) for line in (directory / "cgroup.procs").read_text().split()]
            except OSError:
                continue  # that cgroup is gone
        return sorted(set(pids))

    def _directories(self) -> list[Path]:
        # Not Path.glob: it raises when a directory goes while it is being looked at.
        return [Path(directory) for directory, _, _ in os.walk(self._path)]

    def kill(self) -> None:
        try:
            (self._path / "cgroup.kill").write_text("1")
        except FileNotFoundError:
            return  # before Linux 5.14, or the cgroup is gone
        except OSError:
            for pid in self.members():
                signal_process(pid, signal.SIGKILL)

    def wait_empty(self, timeout: float) -> bool:
        deadline = time.monotonic() + timeout
        try:
            with (self._path / "cgroup.events").open() as events:
                poll = select.poll()
                # The kernel announces a change of cgroup.events with POLLPRI (cgroup-v2.rst, "populated").
                poll.register(events, select.POLLPRI)
                while True:
                    events.seek(0)
                    if "populated 0" in events.read():
                        return True
                    left = deadline - time.monotonic()
                    if left <= 0:
                        return False
                    poll.poll(left * 1000)
        except OSError:
            return not self._path.exists()

    def freeze(self, frozen: bool) -> None:
        (self._path / "cgroup.freeze").write_text("1" if frozen else "0")

    def is_frozen(self) -> bool:
        try:
            return (self._path / "cgroup.freeze").read_text().strip() == "1"
        except OSError:
            return False

    def release(self) -> None:
        # The deepest first; one that holds a process stays.
        for directory in sorted(self._directories(), reverse=True):
            try:
                directory.rmdir()
            except OSError:
                pass  # already gone, or not empty after all: the next daemon looks again


class MarkedGroup:
    """A group found by ancestry, session and mark, where there is no cgroup to hold it."""

    cgroup = ""

    def __init__(self, leader: int, leader_ticks: int, mark: str) -> None:
        """`leader_ticks`: when the leader started. Once it is gone, its number may come to mean a stranger."""
        self._leader = leader
        self._leader_ticks = leader_ticks
        self._mark = f"{MARK}={mark}".encode()

    def enter(self, pid: int) -> None:
        self._leader = pid
        self._leader_ticks = start_ticks(pid) or 0

    def members(self) -> list[int]:
        if not self._leader:
            return []
        # A number is not given out again while it names a session, so with a stranger's the session is his as well.
        leader = self._leader if start_ticks(self._leader) in (self._leader_ticks, None) else -1
        parents: dict[int, int] = {}
        found: set[int] = set()
        for entry in os.scandir("/proc"):
            if not entry.name.isdigit():
                continue
            pid = int(entry.name)
            try:
                stat = Path(entry.path, "stat").read_bytes()
                fields = stat.rpartition(b")")[2].split()
                if fields[0] in (b"Z", b"X"):
                    continue
                parents[pid] = int(fields[1])
                if leader in (pid, int(fields[3])) or self._is_marked(entry.path):
                    found.add(pid)
            except (OSError, IndexError):
                continue  # it ended while we looked, or is not ours to look at
        grown = True
        while grown:
            more = {pid for pid, parent in parents.items() if parent in found and pid not in found}
            found |= more
            grown = bool(more)
        found.discard(os.getpid())
        return sorted(found)

    def _is_marked(self, path: str) -> bool:
        return self._mark in Path(path, "environ").read_bytes().split(b"\0")

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
            return Path(f"/proc/{self._leader}/stat").read_bytes().rpartition(b")")[2].split()[0] == b"T"
        except OSError:
            return False

    def release(self) -> None:
        """Nothing is left of it."""


class Groups:
    """Makes groups, by the strongest means there is."""

    def __init__(self, name: str) -> None:
        """`name`: unique to this daemon's runtime directory."""
        self.name = name
        self._base = _cgroup_base(name)

    @property
    def cgroup_base(self) -> Path | None:
        return self._base

    def new(self, worker: str, incarnation: int) -> Group:
        if self._base is not None:
            return CgroupGroup(self._base / f"{worker}-{incarnation}")
        return MarkedGroup(0, 0, self.mark(worker, incarnation))

    def mark(self, worker: str, incarnation: int) -> str:
        """The value of MARK in a worker's environment: unique on this machine."""
        return f"{self.name}/{worker}-{incarnation}"

    def known(self, record: Record) -> Group:
        """The group of a worker that was alive before the daemon was."""
        if record.cgroup:
            return CgroupGroup(Path(record.cgroup))
        return MarkedGroup(record.pid, record.start_ticks, self.mark(record.worker, record.incarnation))

    def sweep(self) -> None:
        """Remove what an earlier daemon left empty: a crash between making a group and recording it does that."""
        for path in self._base.glob("*/") if self._base is not None else ():
            CgroupGroup(path).release()

    def close(self) -> None:
        if self._base is not None:
            try:
                self._base.rmdir()
            except OSError:
                pass  # workers live on in it


def _cgroup_base(name: str) -> Path | None:
    """A directory of our own in the cgroup v2 tree, below the cgroup we are in; None where we may not make one."""
    try:
        mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        root = next(Path(fields[4]) for fields in mounts if fields[fields.index("-") + 1] == "cgroup2")
        ours = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return None
    base = root / ours.removeprefix("0::").lstrip("/") / name
    try:
        base.mkdir(exist_ok=True)
        if not (base / "cgroup.kill").exists() or not os.access(base / "cgroup.procs", os.W_OK):
            base.rmdir()
            return None
    except OSError:
        return None
    return base


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

"""Every process of this machine in one reading of /proc, told apart by the group that it belongs to.

For groups that no cgroup holds: a reading costs the same for a thousand groups as for one. Reads only. A process that
vanishes while it is read counts as gone, one that we may not look at as nobody's.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final, NamedTuple

#: More than almost any file of /proc/PID has; a larger buffer would be mapped anew for each read.
_READ_BYTES: Final = 1 << 16


class Claim(NamedTuple):
    """How a group's processes are known: by their leader, by its session, by a mark in their first environment; and
    whoever descends from those."""

    leader: int
    #: When the leader started. Once it is gone, its number may come to mean a stranger.
    leader_ticks: int
    #: As it stands in the environment, NAME=value.
    mark: bytes


class Processes:
    """Keeps what it learnt of processes that live on: a mark once seen stays, whatever the process runs later."""

    def __init__(self) -> None:
        #: By process id and start time.
        self._marks: dict[tuple[int, bytes], bytes] = {}

    def read(self, claims: Sequence[Claim]) -> list[dict[int, bytes]]:
        """For each claim the processes that live, by number, with their lines of /proc/PID/stat."""
        lines: dict[int, bytes] = {}
        parents: dict[int, int] = {}
        sessions: dict[int, int] = {}
        ticks: dict[int, bytes] = {}
        for entry in os.scandir("/proc"):
            if not (name := entry.name).isdigit():
                continue
            try:
                line = read(f"/proc/{name}/stat")
                # The manual's field 3 and on, proc_pid_stat(5); the name in parentheses may hold anything.
                fields = line[line.rindex(b")") + 2 :].split(None, 20)
                pid, ticks[pid] = int(name), fields[19]
                if fields[0] not in (b"Z", b"X"):
                    lines[pid], parents[pid], sessions[pid] = line, int(fields[1]), int(fields[3])
            except (OSError, IndexError, ValueError):
                continue  # it ended while we looked
        leaders, marks = {}, {}
        for number, claim in enumerate(claims):
            if not claim.leader:
                continue
            marks[claim.mark] = number
            # A number is not given out again while it names a session, so with a stranger's the session is his as well.
            if int(ticks.get(claim.leader, claim.leader_ticks)) == claim.leader_ticks:
                leaders[claim.leader] = number
        owners = self._owners(parents, sessions, ticks, leaders, marks)
        found: list[dict[int, bytes]] = [{} for _ in claims]
        for pid in sorted(lines):
            if (owner := owners.get(pid)) is not None:
                found[owner][pid] = lines[pid]
        return found

    def _owners(
        self, parents: dict[int, int], sessions: dict[int, int], ticks: dict[int, bytes],
        leaders: dict[int, int], marks: dict[bytes, int],
    ) -> dict[int, int | None]:  # fmt: skip
        known, self._marks = self._marks, {}
        owners: dict[int, int | None] = {os.getpid(): None}
        for pid, session in sessions.items():
            if pid in owners:
                continue
            owner = leaders.get(pid, leaders.get(session))
            if owner is None:
                key = pid, ticks[pid]
                mark = known.get(key) or _mark(pid, marks)
                if mark:
                    self._marks[key] = mark
                    owner = marks.get(mark)
            if owner is not None:
                owners[pid] = owner
        for pid in parents:
            line = []
            while pid in parents and pid not in owners:
                # Nobody's, until an ancestor is found to be somebody's: two numbers used again could make a ring.
                owners[pid] = None
                line.append(pid)
                pid = parents[pid]
            owners.update(dict.fromkeys(line, owners.get(pid)))
        return owners


def _mark(pid: int, marks: dict[bytes, int]) -> bytes:
    """Which of `marks` a process has in its environment; empty: none."""
    try:
        environment = read(f"/proc/{pid}/environ").split(b"\0")
    except OSError:
        return b""  # it ended, or is not ours to look at
    return next((item for item in environment if item in marks), b"")


def read(path: str) -> bytes:
    """A file of /proc, whole. Thousands a second are read, so it is done in as few calls as can be. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        text = piece = os.read(fd, _READ_BYTES)
        while len(piece) == _READ_BYTES:
            piece = os.read(fd, _READ_BYTES)
            text += piece
        return text
    finally:
        os.close(fd)

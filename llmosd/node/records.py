"""Who is alive, for the next life of the daemon: one small file a worker in the runtime directory.

Written before the worker may run its program, and again with the intent before a signal ends it. A process is named
by (boot id, pid, start time): pids are reused, that triple is not. The runtime directory does not survive a boot.
"""

from __future__ import annotations

import os
import select
from pathlib import Path
from typing import Final

import msgspec

from llmosd.kernel.ledger import Grant
from llmosd.kernel.restart import ExitStatus
from llmosd.kernel.spec import Limits, ModelSpec
from llmosd.kernel.units import decode_quantity, encode_quantity
from llmosd.launch.reap import ended

_encoder: Final = msgspec.json.Encoder(enc_hook=encode_quantity)


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What must be known to adopt a worker, or to end what is left of it."""

    worker: str
    incarnation: int
    boot_id: str
    pid: int
    #: Clock ticks after boot, /proc/PID/stat field 22.
    start_ticks: int
    #: Monotonic seconds.
    started_at: float
    identity: bytes
    token: bytes
    spec: ModelSpec
    limits: Limits
    grant: Grant
    #: Path of its cgroup; empty where there is none.
    cgroup: str = ""
    #: The inode of the pipe that its stdout and stderr are; 0: none.
    output_inode: int = 0
    #: The intent is that it ends: now, or when its requests are done.
    stopping: bool = False
    #: A command that was found to be ready.
    ready: bool = False
    #: Where in its log file this life begins, in bytes.
    log_start: int = 0
    draining: bool = False
    #: How its leader ended; None: no daemon has seen its end.
    ended: ExitStatus | None = None


class RecordError(Exception):
    """A record that cannot be read. It is set aside, not deleted: what it names may live."""


def path_of(directory: Path, worker: str) -> Path:
    return directory / f"{worker}.json"


def write(directory: Path, record: Record) -> None:
    """Put a record in force, whole or not at all: a reader sees the old one or the new one."""
    path = path_of(directory, record.worker)
    draft = path.with_suffix(".draft")
    draft.touch(mode=0o600)
    draft.write_bytes(_encoder.encode(record))
    draft.replace(path)


def remove(directory: Path, worker: str) -> None:
    path_of(directory, worker).unlink(missing_ok=True)


def read(path: Path) -> Record:
    """Raises RecordError."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Record, dec_hook=decode_quantity)
    except (OSError, msgspec.DecodeError, ValueError) as error:
        raise RecordError(f"{path}: {error}") from error


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks after boot; None if there is no such process.

    Raises PermissionError where that cannot be known, which does not mean that it is gone.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the program's name in parentheses, and may hold anything.
    return int(stat.rpartition(")")[2].split()[19])


def end_of(pid: int, started: int) -> ExitStatus:
    """How a process ended that was not a child of ours: known only until somebody has reaped it."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return ExitStatus()
    try:
        return ExitStatus(*ended(pidfd, pid, 0)) if start_ticks(pid) == started else ExitStatus()
    finally:
        os.close(pidfd)


def open_process(pid: int, started: int) -> int | None:
    """A pidfd of the process that had this number at that time; None if it is gone. Raises PermissionError."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    # Checked after opening: from here on the descriptor cannot come to mean another process. One that is readable has
    # ended, though nobody has reaped it.
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    if start_ticks(pid) == started and not poll.poll(0):
        return pidfd
    os.close(pidfd)
    return None

"""What a daemon holds in its runtime directory besides sockets and records: its lock, and its key to sign tickets."""

from __future__ import annotations

import fcntl
import hashlib
import os
import resource
from pathlib import Path
from typing import Final

_KEY_BYTES: Final = 32


#: (soft, hard) RLIMIT_NOFILE with which this process was started: workers begin with the same.
OPEN_FILES: Final = resource.getrlimit(resource.RLIMIT_NOFILE)


def raise_open_files() -> None:
    """Use all the descriptors that are allowed: a worker takes several, and so does each client.

    The soft limit is low only for programs that use select(2) (systemd's default, "File Descriptor Limits").
    """
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES[1], OPEN_FILES[1]))


def restore_open_files() -> None:
    """As it was when this process was started: a program that replaces this one is to find it so."""
    resource.setrlimit(resource.RLIMIT_NOFILE, OPEN_FILES)


class AlreadyRunning(Exception):  # noqa: N818  # it is a statement of fact
    """Another daemon has this runtime directory."""


def hold(runtime: Path, kept: int = -1) -> int:
    """Hold the runtime directory for this process's life: a second bind would take the sockets' paths silently.

    `kept`: the descriptor by which this process's earlier program held it. Raises AlreadyRunning.
    """
    if kept >= 0:
        return kept
    fd = os.open(runtime / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(fd, 32).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        raise AlreadyRunning(f"another llmosd (pid {holder}) has {runtime}") from None
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def daemon_name(runtime: Path) -> str:
    """What tells this daemon's cgroup and processes from those of others on this machine: the same in each life."""
    return f"llmosd-{hashlib.sha256(str(runtime).encode()).hexdigest()[:12]}"


def ticket_key(runtime: Path) -> bytes:
    """The key that signs tickets: the same for every daemon of this boot."""
    path = runtime / "ticket-key"
    try:
        key = path.read_bytes()
        if len(key) == _KEY_BYTES:
            return key
    except FileNotFoundError:
        pass  # the first daemon of this boot
    key = os.urandom(_KEY_BYTES)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(key)
    return key

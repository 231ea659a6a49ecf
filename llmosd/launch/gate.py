"""The parent's side of the gate: spawn a child that waits, tell it to go, hear how it went.

Uses `os.posix_spawn`: a fork of a process with threads of gRPC's or ZeroMQ's may deadlock in the child.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import os
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

_CHILD: Final = str(Path(__file__).with_name("child.py"))
#: Where the child finds its end of the gate; what is granted follows.
GATE_FD: Final = 3
FIRST_GRANT: Final = 4
#: Above any number that a grant may have, so that moving descriptors into place overwrites none that is yet to move.
_PARKED: Final = 100
#: Signals whose disposition a parent may have changed; KILL and STOP have none.
_RESET: Final = [n for n in signal.valid_signals() if n not in (signal.SIGKILL, signal.SIGSTOP)]
#: What a child may inherit of the environment; everything else a model file must name.
ENVIRONMENT: Final = (
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "TERM",
    "XDG_RUNTIME_DIR", "XDG_CACHE_HOME", "LD_LIBRARY_PATH", "SSL_CERT_FILE", "HF_HOME", "CUDA_HOME", "NO_COLOR",
)  # fmt: skip


#: Errors of exec that trying again will not mend.
HOPELESS: Final = frozenset({errno.ENOENT, errno.EACCES, errno.ENOEXEC, errno.ENOTDIR, errno.EISDIR})


#: Steps that isolate, and their errors that trying again will not mend.
ISOLATION: Final = frozenset({"namespaces", "drop_capabilities", "user", "no_new_privileges"})
FORBIDDEN: Final = HOPELESS | {errno.EPERM, errno.ENOSYS, errno.EINVAL, errno.ENODEV, errno.EROFS}


class User(msgspec.Struct, frozen=True):
    uid: int
    gid: int
    groups: tuple[int, ...] = ()


class Namespaces(msgspec.Struct, frozen=True, kw_only=True):
    """What the child sees of this machine. All paths are absolute, and exist."""

    #: No network but a loopback of its own.
    private_network: bool = False
    #: Directories replaced by a new and empty one, each with its mode; they live as long as the worker.
    private: tuple[tuple[str, int], ...] = ()
    #: Read-only, with all that is below.
    read_only: tuple[str, ...] = ()
    #: Shown, read-only, though they lie in a private directory.
    readable: tuple[str, ...] = ()
    #: As they are, though they lie in a private directory or in a read-only one.
    writable: tuple[str, ...] = ()
    #: The device nodes that are left in /dev, by their names in it, where they exist; None: all.
    devices: tuple[str, ...] | None = None


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What the child is to become. None leaves a property as it is inherited."""

    argv: tuple[str, ...]
    env: dict[str, str]
    cwd: str | None = None
    umask: int | None = None
    #: Soft and hard limit by name, without RLIMIT_.
    rlimits: dict[str, tuple[int, int]] | None = None
    oom_score_adj: int | None = None
    cpu_affinity: tuple[int, ...] | None = None
    #: The NUMA node whose memory is preferred.
    memory_node: int | None = None
    nice: int | None = None
    #: I/O scheduling class and level.
    ionice: tuple[int, int] | None = None
    #: Orphaned descendants become its children, not init's.
    subreaper: bool | None = None
    namespaces: Namespaces | None = None
    #: By number; for all programs that it runs, whoever they run as.
    drop_capabilities: tuple[int, ...] | None = None
    user: User | None = None
    no_new_privileges: bool | None = None
    parent_death_signal: int | None = None
    keep_fds: tuple[int, ...] = ()


class SetUpError(Exception):
    """The child did not get as far as its program. `step` names what failed."""

    def __init__(self, step: str, number: int, message: str) -> None:
        super().__init__(message)
        self.step = step
        self.errno = number


class Gate:
    """A child that waits. Whoever drops it without `go` lets it end."""

    def __init__(self, pid: int, pidfd: int, sock: socket.socket) -> None:
        self.pid = pid
        #: Names the child for good: pids are reused, this is not. The caller's to close.
        self.pidfd = pidfd
        self._sock = sock

    @classmethod
    def spawn(cls, *, stdin: int, stdout: int, stderr: int, grants: Mapping[int, int] = {}) -> Gate:
        """Start a child at the gate, the leader of its own session.

        `grants`: which descriptor of ours each of its own shall be. Raises OSError.
        """
        ours, theirs = socket.socketpair()
        wanted = {0: stdin, 1: stdout, 2: stderr, GATE_FD: theirs.fileno(), **grants}
        parked: list[int] = []
        try:
            actions = []
            for target, source in wanted.items():
                parked.append(fcntl.fcntl(source, fcntl.F_DUPFD_CLOEXEC, _PARKED))
                actions.append((os.POSIX_SPAWN_DUP2, parked[-1], target))
            pid = os.posix_spawn(
                sys.executable,
                [sys.executable, "-I", "-S", _CHILD, str(GATE_FD)],
                {},
                file_actions=actions,
                setsigmask=[],
                setsigdef=_RESET,
            )
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
            for fd in parked:
                os.close(fd)
        # Not reaped by anybody but us, so the number still means our child.
        return cls(pid, os.pidfd_open(pid), ours)

    async def go(self, order: Order) -> None:
        """Let the child become what `order` says; returns once its program runs.

        Raises SetUpError. Either way the gate is closed; the child, if it lives, is the caller's to reap.
        """
        loop = asyncio.get_running_loop()
        self._sock.setblocking(False)
        try:
            await loop.sock_sendall(self._sock, json.dumps(msgspec.to_builtins(order)).encode() + b"\n")
            told = b""
            while piece := await loop.sock_recv(self._sock, 1 << 16):
                told += piece
        except (BrokenPipeError, ConnectionResetError):
            raise SetUpError("gate", 0, "the process was killed before it could start its program") from None
        finally:
            self._sock.close()
        if told:
            failure: dict[str, Any] = json.loads(told)
            raise SetUpError(failure["step"], failure["errno"], failure["error"])

    def shut(self) -> None:
        """Let the child end without having run anything."""
        self._sock.close()


def inherited_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """The allow-list's part of our own environment, and `extra` over it."""
    return {name: os.environ[name] for name in ENVIRONMENT if name in os.environ} | dict(extra)

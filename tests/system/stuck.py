"""Processes that SIGKILL does not end, by two ways: one needs /dev/fuse, the other root and a v1 freezer."""

from __future__ import annotations

import os
import socket
import struct
import sys
from pathlib import Path
from typing import Protocol

import pytest
from engine_models import ENGINES
from machine import DEADLINE_S

_FUSE_INIT = 26
_REQUEST_BYTES = 1 << 17


class Stuck(Protocol):
    """One process that gets stuck."""

    #: What it runs.
    argv: list[str]

    def catch(self, pid: int) -> None:
        """Wait until it is stuck."""

    def release(self) -> None:
        """Let it go on, and be killed. May be called again."""


class OnFuse:
    """It waits for a file system that we serve, and do not answer."""

    def __init__(self, root: Path) -> None:
        path = root / f"fuse-{os.urandom(4).hex()}"
        (path / "mounted").mkdir(parents=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path / "socket"))
        self._listener.listen()
        self._listener.settimeout(DEADLINE_S)
        # In a mount namespace of its own, which goes with it; who may not make one may in a user namespace.
        alone = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--mount"]
        words = [str(ENGINES / "hangs.py"), str(path / "socket"), str(path / "mounted")]
        self.argv = [*alone, sys.executable, "-I", "-S", *words]
        self._fuse = -1

    def catch(self, pid: int) -> None:
        with self._listener, self._listener.accept()[0] as peer:
            (self._fuse,) = socket.recv_fds(peer, 16, 1)[1]
            Path(self._listener.getsockname()).unlink()
        request = os.read(self._fuse, _REQUEST_BYTES)
        _, opcode, unique = struct.unpack_from("=IIQ", request)
        assert opcode == _FUSE_INIT
        # fuse_out_header and fuse_init_out of include/uapi/linux/fuse.h: version 7.31, and nothing special.
        init = struct.pack("=IIII2H2I2H7I", 7, 31, 0, 0, 12, 1, 4096, 1, 0, 0, *[0] * 7)
        os.write(self._fuse, struct.pack("=IiQ", 16 + len(init), 0, unique) + init)
        os.read(self._fuse, _REQUEST_BYTES)  # it asks for the file

    def release(self) -> None:
        if self._fuse >= 0:
            os.close(self._fuse)
            self._fuse = -1


class InFreezer:
    """It is frozen by a cgroup v1 freezer, which unlike v2's lets no signal through."""

    def __init__(self, hierarchy: Path) -> None:
        self.argv = ["sleep", "1000"]
        self._cgroup = hierarchy / f"llmosd-test-{os.urandom(4).hex()}"
        self._cgroup.mkdir()

    def catch(self, pid: int) -> None:
        (self._cgroup / "cgroup.procs").write_text(str(pid))
        (self._cgroup / "freezer.state").write_text("FROZEN")

    def release(self) -> None:
        if self._cgroup.exists():
            (self._cgroup / "freezer.state").write_text("THAWED")
            for pid in (self._cgroup / "cgroup.procs").read_text().split():
                (self._cgroup.parent / "cgroup.procs").write_text(pid)
            self._cgroup.rmdir()


def stuck(root: Path) -> Stuck:
    """By the way that this machine has."""
    if os.access("/dev/fuse", os.R_OK | os.W_OK):
        return OnFuse(root)
    if (freezer := _v1_freezer()) is not None:
        return InFreezer(freezer)
    pytest.skip("nothing here gets a process stuck: that needs /dev/fuse, or root and a cgroup v1 freezer")


def _v1_freezer() -> Path | None:
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, options, *_ = line.split()
        if kind == "cgroup" and "freezer" in options.split(",") and os.access(where, os.W_OK):
            return Path(where)
    return None


def is_in_d_state(pid: int) -> bool:
    """Uninterruptible sleep, as the kernel calls it."""
    return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] == b"D"

"""How a process ended, told exactly where anybody can tell. Never waits for "any child": only for those named."""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import signal
import struct
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Final

#: include/uapi/linux/pidfd.h: PIDFD_GET_INFO is _IOWR(0xFF, 11, struct pidfd_info) with the first version's 64 bytes.
_PIDFD_INFO: Final = struct.Struct("=QQ" + "I" * 11 + "i")
_PIDFD_GET_INFO: Final = 3 << 30 | _PIDFD_INFO.size << 16 | 0xFF << 8 | 11
_PIDFD_INFO_EXIT: Final = 1 << 3
_PR_SET_CHILD_SUBREAPER: Final = 36
#: Seconds between two rounds of killing descendants.
_LOOK_AGAIN_S: Final = 0.005


def reap(pidfd: int) -> tuple[int | None, int | None] | None:
    """(exit code, signal) of a child that has ended, one of them None; None if it is not ours, or still lives."""
    try:
        info = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
    except ChildProcessError:
        return None
    if info is None:
        return None
    return (info.si_status, None) if info.si_code == os.CLD_EXITED else (None, info.si_status)


def ended(pidfd: int, pid: int, patience_s: float) -> tuple[int | None, int | None]:
    """(exit code, signal) of a process that is not our child and has ended; (None, None) where nobody can tell.

    Until somebody reaps it, /proc has its status; afterwards the pidfd has, from Linux 6.15 on. Blocks for at most
    `patience_s` seconds where only the latter may be known.
    """
    deadline = time.monotonic() + patience_s
    while True:
        status = _status_of_zombie(pidfd, pid)
        if status is None:
            status = _status_in_pidfd(pidfd)
        if status is not None:
            return (None, os.WTERMSIG(status)) if os.WIFSIGNALED(status) else (os.WEXITSTATUS(status), None)
        left = deadline - time.monotonic()
        if left <= 0:
            return None, None
        poll = select.poll()
        poll.register(pidfd, 0)  # POLLHUP announces that it was reaped
        poll.poll(min(left, _LOOK_AGAIN_S * 10) * 1000)


def _status_of_zombie(pidfd: int, pid: int) -> int | None:
    """The status in the last field of /proc/PID/stat. The kernel writes a false 0 for who may not trace the process."""
    try:
        owner = Path(f"/proc/{pid}").stat().st_uid
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        # Still named by the pidfd, so the number did not come to mean another process before it was read.
        names_it = f"\nPid:\t{pid}\n" in Path(f"/proc/self/fdinfo/{pidfd}").read_text()
    except (OSError, ValueError):
        return None
    may_know = os.geteuid() in (0, owner)
    return int(fields[-1]) if may_know and names_it and fields[0] == "Z" else None


def _status_in_pidfd(pidfd: int) -> int | None:
    """The status that the kernel keeps with the pidfd. Only the mask bit counts: before, the field is a false 0."""
    buffer = bytearray(_PIDFD_INFO.pack(_PIDFD_INFO_EXIT, *[0] * 13))
    try:
        fcntl.ioctl(pidfd, _PIDFD_GET_INFO, buffer)
    except OSError:
        return None
    fields = _PIDFD_INFO.unpack(buffer)
    return int(fields[-1]) if fields[0] & _PIDFD_INFO_EXIT else None


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent dies (PR_SET_CHILD_SUBREAPER, prctl(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"cannot become a subreaper: {os.strerror(number)}")


def reap_orphans(known: Callable[[], Collection[int]]) -> int:
    """Reap the children that came to us as orphans and have ended. Returns how many.

    `known`: the children that somebody else waits for. It is asked after the children were seen, so that one born
    meanwhile is known too. Each other child is waited for by its own number.
    """
    count = 0
    for pid in set(children()).difference(known()):
        try:
            count += os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG) is not None
        except ChildProcessError:
            pass  # another thread's listing had it too
    return count


def kill_descendants(timeout_s: float) -> bool:
    """SIGKILL to every child until there is none, for a subreaper at its end. False: some are left after `timeout_s`.

    What a child has forked becomes ours when it dies, however it detached itself, and is killed in the next round.
    """
    deadline = time.monotonic() + timeout_s
    while left := children():
        for pid in left:
            try:
                # Ours until it is reaped here, so the number cannot have come to mean another process.
                os.kill(pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass  # reaped by another thread, or another user's by now: the daemon's kill is the last word
        reap_orphans(lambda: ())
        if time.monotonic() > deadline:
            return False
        time.sleep(_LOOK_AGAIN_S)
    return True


def children() -> list[int]:
    """Our children, the dead ones that were not reaped among them."""
    found = []
    for path in Path("/proc/self/task").glob("*/children"):
        try:
            found += [int(pid) for pid in path.read_text().split()]
        except OSError:
            continue  # that thread just ended
    return found

"""Replacing the daemon's program in place: new code in the same process, with its children and its open sockets.

To everybody else it is a daemon that was killed and came back at once, only better: nobody is refused a connection
meanwhile, and workers keep their parent. What the new program needs to know is in the environment, for one exec.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import Final, NoReturn

import msgspec

from llmosd import helper
from llmosd.runtime import restore_open_files

#: Where a program finds what its predecessor kept open for it.
VARIABLE: Final = "LLMOSD_KEPT"
#: They wait while there is nobody to handle them.
SIGNALS: Final = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
#: Seconds in which a new program must be able to say that it works.
_CHECK_S: Final = 60


class Kept(msgspec.Struct, frozen=True):
    """Descriptors that go from one program to the next; -1: there is none."""

    lock: int = -1
    http: int = -1
    front: int = -1
    back: int = -1
    #: The bus's sockets are systemd's; and so is the HTTP one.
    systemds: bool = False
    http_systemds: bool = False
    #: The address that the HTTP one was opened for, as the settings had it.
    listen: str = ""
    #: Signals that came while there was nobody to handle them.
    signals: tuple[int, ...] = ()


class NotUpgraded(Exception):  # noqa: N818  # an answer, not a fault
    """The new program cannot be started; nothing has changed. The text says why."""


def taken_over() -> Kept | None:
    """What the program before this one has kept; None: there was none."""
    text = os.environ.pop(VARIABLE, "")
    if not text:
        return None
    kept = msgspec.json.decode(text, type=Kept)
    for fd in _descriptors(kept):
        os.set_inheritable(fd, False)
    return kept


def check(known: set[int]) -> str:
    """Have the program that is installed now read its settings; returns its version. Blocks. Raises NotUpgraded.

    `known`: see `helper.run`.
    """
    command = [*_command(), "config"]
    try:
        done = helper.run(command, known, _CHECK_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotUpgraded(f"llmosd cannot be started again: {error}") from None
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise NotUpgraded(f"llmosd goes on as it is, for the program that would replace it fails: {last}")
    try:
        return str(msgspec.json.decode(done.stdout, type=dict[str, object])["version"])
    except (msgspec.DecodeError, KeyError):
        raise NotUpgraded(f"{' '.join(command)} does not print its settings: it is no llmosd") from None


_came: Final[list[int]] = []


def hold_signals() -> None:
    """From here on signals wait for the new program, which is told of them: another thread's mask lets them in."""
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: _came.append(number))
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def let_signals_through(kept: Kept) -> None:
    """Now that they are handled, those that came meanwhile come again."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    for number in kept.signals:
        os.kill(os.getpid(), number)


def replace(kept: Kept) -> NoReturn:
    """Become the new program. Nothing but `kept` may be needed any more. Raises OSError."""
    for fd in _descriptors(kept):
        os.set_inheritable(fd, True)
    restore_open_files()
    command = _command()
    kept = msgspec.structs.replace(kept, signals=tuple(_came))
    os.execve(command[0], command, {**os.environ, VARIABLE: msgspec.json.encode(kept).decode()})


def _command() -> list[str]:
    """How this process was started: the same words find what is installed now."""
    return [sys.executable, *sys.orig_argv[1:]]


def _descriptors(kept: Kept) -> list[int]:
    return [fd for fd in (kept.lock, kept.http, kept.front, kept.back) if fd >= 0]

"""Words with systemd: readiness, watchdog, the journal, and sockets that it opened. Nothing where there is none.

Uses `systemd-python` where it is installed (the `systemd` extra). Without it the daemon runs the same, and says less.
"""

from __future__ import annotations

import importlib
import logging
import os
import socket
import subprocess
from pathlib import Path
from typing import Any, Final

from llmosd import helper


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


#: Seconds that systemctl has to answer while a stop waits for it.
_SYSTEMCTL_S: Final = 10
_daemon: Final = _import("systemd.daemon")


def log_handler() -> logging.Handler:
    """Where the daemon's own log goes: the journal, when systemd connected stderr to it, else stderr."""
    journal = _import("systemd.journal") if _under_journal() else None
    if journal is not None:
        handler: logging.Handler = journal.JournalHandler(SYSLOG_IDENTIFIER="llmosd")
        return handler
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s"))
    return handler


def _under_journal() -> bool:
    """Whether systemd connected stderr to the journal. The variable is inherited further: systemd.exec(5)."""
    status = os.fstat(2)
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def to_journal(wanted: str) -> bool:
    """Whether workers' output goes to the journal too: ``yes``, ``no``, or as the daemon's own (``auto``)."""
    return _under_journal() if wanted == "auto" else wanted == "yes"


def fields(subject: str, model: str = "") -> dict[str, str]:
    """A worker's fields in the journal, for the daemon's own lines on it: the same as its output has."""
    of, at, _ = subject.rpartition("@")
    return {"LLMOS_WORKER": subject, "LLMOS_MODEL": of} if at else {"LLMOS_MODEL": model} if model else {}


def notify(state: str) -> None:
    """sd_notify(3), for example ``READY=1``."""
    if _daemon is not None and os.environ.get("NOTIFY_SOCKET"):
        _daemon.notify(state)


def watchdog_s() -> float | None:
    """How often systemd wants a sign of life, in seconds; None: it does not."""
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    meant_for = os.environ.get("WATCHDOG_PID", str(os.getpid()))
    if _daemon is None or not microseconds.isdigit() or meant_for != str(os.getpid()):
        return None
    return int(microseconds) / 2e6


def job_under_way(known: set[int]) -> str | None:
    """The job that systemd has for our unit: "stop", "restart", …; "" for none, or if that cannot be learnt.

    None: systemd did not start this process. `known`: see `helper.run`. Blocks.
    """
    if os.environ.get("SYSTEMD_EXEC_PID") != str(os.getpid()):
        return None
    ours = [part for line in Path("/proc/self/cgroup").read_text().splitlines() for part in line.split("/")]
    command = ["systemctl", "list-jobs", "--no-legend", "--no-pager", "--plain"]
    try:
        done = helper.run([*command, *(["--user"] if os.geteuid() else [])], known, _SYSTEMCTL_S)
    except (OSError, subprocess.SubprocessError):
        return ""
    # Number, unit, type and state.
    jobs = [line.split() for line in done.stdout.splitlines()]
    return next((job[2] for job in jobs if len(job) >= 3 and job[1].endswith(".service") and job[1] in ours), "")


def passed_sockets() -> dict[str, int]:
    """Descriptors of sockets that systemd opened for us, by their names in the unit (sd_listen_fds_with_names(3))."""
    if _daemon is None or not os.environ.get("LISTEN_FDS"):
        return {}
    # Not inherited by workers: whatever they are granted is moved into place by the launcher.
    found = {str(name): int(fd) for fd, name in _daemon.listen_fds_with_names(True).items()}
    for fd in found.values():
        os.set_inheritable(fd, False)
    return found


def listen_tcp(address: str) -> socket.socket:
    """A listening socket for ``host:port``. Raises OSError."""
    host, _, port = address.rpartition(":")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host.strip("[]"), int(port)))
        listener.listen(1024)
    except OSError:
        listener.close()
        raise
    return listener

"""Words with systemd: readiness, status, watchdog, and sockets that it opened. Nothing of it where there is none.

Uses `systemd-python` where it is installed (the `systemd` extra). Without it the daemon runs the same, and says less.
"""

from __future__ import annotations

import importlib
import os
import socket
from typing import Any, Final


def _import_systemd() -> Any:
    try:
        return importlib.import_module("systemd.daemon")
    except ImportError:
        return None


_daemon: Final = _import_systemd()


def notify(state: str) -> None:
    """sd_notify(3), for example ``READY=1``."""
    if _daemon is not None and os.environ.get("NOTIFY_SOCKET"):
        _daemon.notify(state)


def watchdog_s() -> float | None:
    """How often systemd wants a sign of life, in seconds; None: it does not."""
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    if (
        _daemon is None
        or not microseconds.isdigit()
        or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid())
    ):
        return None
    return int(microseconds) / 2e6


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

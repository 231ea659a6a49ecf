"""The sockets that listen: opened here, passed on by systemd, or kept from this process's earlier program.

They belong to the daemon, not to who serves on them, so that a restart of the gateway, or of the daemon's own program,
refuses nobody: whoever connects meanwhile waits.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

from llmosd.health import target
from llmosd.notify import listen_tcp
from llmosd.upgrade import Kept

#: Connections that may wait to be accepted; the kernel's own bound (net.core.somaxconn) is 4096 at most.
_BACKLOG = 1024


class HttpSocket:
    """The gateway's. Opened when it is first asked for, unless it was given.

    A gateway outlives a crash of its daemon and goes on listening, on a socket that the next daemon cannot get at. So
    that one opens its own only when it has a gateway to start.
    """

    def __init__(self, address: str, fd: int = -1, *, systemds: bool = False) -> None:
        """`address`: ``host:port``. `fd`: a socket that listens already; `systemds`: wherever systemd was told to."""
        self._address = address
        self._passed = systemds
        self._socket = socket.socket(fileno=fd) if fd >= 0 else None

    @property
    def is_open(self) -> bool:
        return self._socket is not None

    def fileno(self) -> int:
        """Raises OSError when the address cannot be listened on."""
        if self._socket is None:
            try:
                self._socket = listen_tcp(self._address)
            except OSError as error:
                raise OSError(
                    f"gateway.listen: cannot listen on {self._address}: {error.strerror or error}; end whoever has "
                    "that port, or set another in llmosd.toml ([gateway] listen)"
                ) from error
        return self._socket.fileno()

    @property
    def url(self) -> str:
        host, _, port = self._address.rpartition(":")
        if self._socket is not None:
            host, port = self._socket.getsockname()[:2]
        return f"http://{_bracketed(host)}:{port}"

    @property
    def health_url(self) -> str:
        """Where this machine can ask the gateway how it is; "" where that is not known before it is opened, or nowhere.

        Not by what is open: it must be the same for a daemon that opened the socket, and the next one that did not.
        """
        host, _, port = self._address.rpartition(":")
        if self._passed and self._socket is not None:
            if self._socket.family == socket.AF_UNIX:
                return ""
            host, port = self._socket.getsockname()[:2]
            host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        url = f"http://{_bracketed(host)}:{port}/health"
        try:
            target(url)
        except ValueError:
            return ""
        return url

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()


def http_socket(enabled: bool, address: str, kept: Kept) -> HttpSocket | None:
    """The gateway's socket, if there is to be a gateway. One that was kept and is of no use is closed: whoever connects
    to it would wait for ever."""
    fits = enabled and (kept.http_systemds or kept.listen == address)
    if kept.http >= 0 and not fits:
        os.close(kept.http)
    return HttpSocket(address, kept.http if fits else -1, systemds=kept.http_systemds) if enabled else None


class BusSocket:
    """One of the bus's, at a path. ZeroMQ serves on a duplicate, for it closes what it is given."""

    def __init__(self, path: Path, fd: int = -1, *, systemds: bool = False) -> None:
        """`fd`: a socket that listens already; `systemds`: its path is systemd's to remove. Raises OSError."""
        self._path = path
        self._is_ours = not systemds
        if fd >= 0:
            self._socket = socket.socket(fileno=fd)
            return
        path.unlink(missing_ok=True)  # of a daemon that was killed: the runtime directory is held by us
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.bind(str(path))
            path.chmod(0o660)
            self._socket.listen(_BACKLOG)
        except OSError:
            self._socket.close()
            raise

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def is_ours(self) -> bool:
        return self._is_ours

    def duplicate(self) -> int:
        return os.dup(self._socket.fileno())

    def close(self) -> None:
        self._socket.close()
        if self._is_ours:
            self._path.unlink(missing_ok=True)


def _bracketed(host: str) -> str:
    """An IPv6 address as it stands in a URL."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host

"""The gateway's listening socket. For the daemon, which keeps it open, so that a restart of the gateway refuses nobody.

A gateway outlives a crash of its daemon and goes on listening, on a socket that the next daemon cannot get at. So that
one opens its own only when it has a gateway to start.
"""

from __future__ import annotations

import socket

from llmosd.health import target
from llmosd.notify import listen_tcp


class HttpSocket:
    """Opened when it is first asked for, unless it was passed on by systemd."""

    def __init__(self, address: str, fd: int = -1) -> None:
        """`address`: ``host:port``. `fd`: a socket that listens already."""
        self._address = address
        self._passed = fd >= 0
        self._socket = socket.socket(fileno=fd) if self._passed else None

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


def _bracketed(host: str) -> str:
    """An IPv6 address as it stands in a URL."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host

"""The gateway's listening socket. For the daemon, which keeps it open, so that a restart of the gateway refuses nobody.

A gateway outlives a crash of its daemon and goes on listening, on a socket that the next daemon cannot get at. So that
one opens its own only when it has a gateway to start.
"""

from __future__ import annotations

import socket

from llmosd.notify import listen_tcp


class HttpSocket:
    """Opened when it is first asked for, unless it was passed on by systemd."""

    def __init__(self, address: str, fd: int = -1) -> None:
        """`address`: ``host:port``. `fd`: a socket that listens already."""
        self._address = address
        self._socket = socket.socket(fileno=fd) if fd >= 0 else None

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
        return f"http://{f'[{host}]' if ':' in host and not host.startswith('[') else host}:{port}"

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()

"""The processes of the bus's clients: the end of one is the end of what it waits for.

ZeroMQ tells who a peer is on a unix socket; a pidfd of that process becomes readable when it ends.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Final

#: Connections of one process that are remembered. One that opens more in its life is forgotten from the oldest on.
PEERS_PER_PROCESS: Final = 4096


class ClientProcesses:
    """Watches the processes behind connections. `on_lost` is told each connection whose process has ended."""

    def __init__(self, on_lost: Callable[[bytes, str], None]) -> None:
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        #: By process: its pidfd, and its connections in the order in which they came.
        self._processes: dict[int, tuple[int, dict[bytes, None]]] = {}

    def watch(self, peer: bytes, pid: int) -> None:
        known = self._processes.get(pid)
        if known is None:
            try:
                pidfd = os.pidfd_open(pid)
            except OSError:
                # Gone already, or in another pid namespace, where it has no number here.
                if pid > 0:
                    self._loop.call_soon(self._on_lost, peer, "its process ended")
                return
            known = self._processes[pid] = (pidfd, {})
            self._loop.add_reader(pidfd, self._ended, pid)
        peers = known[1]
        peers[peer] = None
        if len(peers) > PEERS_PER_PROCESS:
            oldest = next(iter(peers))
            del peers[oldest]
            self._on_lost(oldest, "its process opened too many connections")

    def close(self) -> None:
        for pidfd, _ in self._processes.values():
            self._loop.remove_reader(pidfd)
            os.close(pidfd)
        self._processes.clear()

    def _ended(self, pid: int) -> None:
        pidfd, peers = self._processes.pop(pid)
        self._loop.remove_reader(pidfd)
        os.close(pidfd)
        for peer in peers:
            self._on_lost(peer, "its process ended")

"""A peer of the bus that keeps no rule: for tests of what the daemon does with such."""

from __future__ import annotations

import os

import zmq
from machine import Machine

from llmos.protocol import frames as f


class Peer:
    """A raw DEALER, which says what it likes."""

    def __init__(self, shared: Machine, side: str, identity: bytes = b"") -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 5000)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.IDENTITY, identity or b"\x01" + os.urandom(15))
        self._socket.connect(f"ipc://{shared.runtime}/{side}.sock")

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self._context.term()

    def say(self, *parts: bytes) -> None:
        self._socket.send_multipart(parts)

    def hear(self, table: f.Table) -> f.Message:
        assert self._socket.poll(10_000), "no answer"
        return f.decode(table, self._socket.recv_multipart())

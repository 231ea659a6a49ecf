"""A ZeroMQ DEALER on an asyncio loop: the socket under both halves of the bus. It knows no message.

Register, receive, send, and hear of connections; by the rules that `proto/bus.md` gives for sockets. `zmq.asyncio` is
not used: it costs 2.4 times as much a message. Works on asyncio's own loop and on uvloop.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from typing import Final

import zmq

from llmos.multipart import receive_parts, send_parts

#: Messages received in one go before other callbacks of the loop have their turn.
BATCH_MESSAGES: Final = 256
#: Milliseconds between attempts to connect: a restarting daemon is away for about a second.
RECONNECT_MS: Final = 20
RECONNECT_MAX_MS: Final = 200
#: Milliseconds that closing waits for the last acknowledgements to leave.
LAST_WORDS_MS: Final = 100


class Dealer:
    """One connection to a ROUTER. It reconnects by itself; `on_connected` is called after each handshake."""

    def __init__(
        self,
        address: str,
        identity: bytes,
        on_messages: Callable[[list[list[bytes]]], None],
        on_connected: Callable[[], None],
    ) -> None:
        """Connects. `identity`: 16 bytes, the first not 0: those are libzmq's own. Raises zmq.ZMQError."""
        self._loop = asyncio.get_running_loop()
        self._on_messages = on_messages
        self._on_connected = on_connected
        self._readable_soon = False
        self.closed = False
        #: A handshake succeeded, and the connection has not been lost since.
        self.connected = False
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        for option, value in (
            (zmq.SNDHWM, 0),
            (zmq.RCVHWM, 0),
            (zmq.LINGER, 0),
            # What is sent while nobody is connected is dropped, not hoarded: HELLO and its answer repair that.
            (zmq.IMMEDIATE, 1),
            (zmq.RECONNECT_IVL, RECONNECT_MS),
            (zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS),
        ):
            self._socket.setsockopt(option, value)
        self._socket.setsockopt(zmq.IDENTITY, identity)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        self._loop.add_reader(self._socket.fileno(), self._readable)
        self._loop.add_reader(self._monitor.fileno(), self._monitored)
        # A descriptor tells nothing before its socket has been found empty once.
        self._loop.call_soon(self._readable)
        self._loop.call_soon(self._monitored)
        try:
            self._socket.connect(address)
        except zmq.ZMQError:
            self.close()
            raise

    def send(self, messages: list[list[bytes]]) -> None:
        """Send and empty `messages`, and see to it that no wake-up is lost."""
        if self.closed:
            messages.clear()
            return
        try:
            for message in messages:
                send_parts(self._socket, message)
        except zmq.Again:
            pass  # Nobody is connected: the next HELLO makes up for all of it.
        messages.clear()
        # A send may have eaten the descriptor's edge.
        if not self._readable_soon and int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            self._readable_soon = True
            self._loop.call_soon(self._readable)

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self._socket.fileno())
        self._loop.remove_reader(self._monitor.fileno())
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(LAST_WORDS_MS)
        self._context.term()

    def _readable(self) -> None:
        """Messages may be there. The descriptor is edge-triggered: only an empty socket will call again."""
        self._readable_soon = False
        if self.closed:
            return
        messages: list[list[bytes]] = []
        try:
            while len(messages) < BATCH_MESSAGES:
                first, rest = receive_parts(self._socket)
                messages.append([first.bytes, *rest])
        except zmq.Again:
            pass
        else:
            self._readable_soon = True
            self._loop.call_soon(self._readable)
        if messages:
            self._on_messages(messages)

    def _monitored(self) -> None:
        """A connection was lost, or a handshake succeeded, with a peer that may be a new one."""
        succeeded = False
        while not self.closed:
            try:
                event, *_ = self._monitor.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            self.connected = struct.unpack_from("=H", event)[0] == zmq.EVENT_HANDSHAKE_SUCCEEDED
            succeeded |= self.connected
        if succeeded:
            # Reading EVENTS makes libzmq attach the new connection: a send before that finds nobody.
            self._socket.getsockopt(zmq.EVENTS)
            self._on_connected()

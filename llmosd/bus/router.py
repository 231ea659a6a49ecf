"""A ROUTER socket on the daemon's loop: decodes what comes, encodes what goes. By the socket rules of `proto/bus.md`.

It must never block, never raise for what a peer sends, and never end a loop over it: bad messages are counted, and
answered where the sender can be told.
"""

from __future__ import annotations

import asyncio
import errno
from collections import Counter
from collections.abc import Callable
from typing import Final

import zmq

from llmos.multipart import receive_parts, send_parts
from llmos.protocol import frames as f
from llmosd.kernel import effects as do

#: Messages received in one go before other callbacks of the loop have their turn.
BATCH_MESSAGES: Final = 512
#: Over the largest body: a message above it is not even received, and its sender is cut off (libzmq does not say so).
HEADROOM_BYTES: Final = 64 << 10

#: Windows bound what answers may wait for a peer. This bounds the refusals to one that floods and never reads; it then
#: counts as unreachable, and whatever it misses it is told again when it says HELLO.
UNREAD_MAX: Final = 50_000

Received = Callable[[bytes, f.Message], None]


class Router:
    """One bound ROUTER."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: str,
        table: f.Table,
        message_max: int,
        on_message: Received,
        *,
        on_unreachable: Callable[[bytes], None],
        on_new_peer: Callable[[bytes, int, int], None] | None = None,
        fd: int = -1,
        unread_max: int = UNREAD_MAX,
    ) -> None:
        """`table`: what peers here may say. `on_new_peer`: (identity, uid, pid) before its first message.

        `unread_max`: messages to one peer that may wait for it to read. `fd`: a socket that listens already, from
        systemd or an earlier life. Raises zmq.ZMQError.
        """
        self.counts: Counter[str] = Counter()
        self._table = table
        self._on_message = on_message
        self._on_unreachable = on_unreachable
        self._on_new_peer = on_new_peer
        self._known: set[bytes] = set()
        self._loop = asyncio.get_running_loop()
        self._socket = context.socket(zmq.ROUTER)
        self._again = False
        for option, value in (
            (zmq.ROUTER_MANDATORY, 1),
            (zmq.ROUTER_HANDOVER, 1),
            (zmq.SNDHWM, unread_max),
            (zmq.RCVHWM, 0),
            (zmq.LINGER, 0),
            (zmq.MAXMSGSIZE, message_max + HEADROOM_BYTES),
        ):
            self._socket.setsockopt(option, value)
        if fd >= 0:
            self._socket.setsockopt(zmq.USE_FD, fd)
        self._socket.bind(address)

    def serve(self) -> None:
        """Begin to receive. Until then whoever connects waits, and what it sends with it."""
        self._loop.add_reader(self._socket.fileno(), self._readable)
        self.resume()

    def send(self, effect: do.ToClient | do.ToWorker) -> None:
        """Send one message. A peer that is not there is told to the kernel."""
        header = effect.header
        first = f.FIRST_FRAME[effect.kind]
        raw = header if isinstance(header, bytes) else f.encode_header(header)
        try:
            send_parts(self._socket, [effect.peer, first, effect.rid, raw, *effect.payload])
        except zmq.ZMQError as error:
            if error.errno not in (errno.EHOSTUNREACH, errno.EAGAIN):
                raise
            self.counts["unreachable"] += 1
            self._known.discard(effect.peer)
            self._on_unreachable(effect.peer)

    def resume(self) -> None:
        """To be called after sending: a send may have eaten the wake-up of a message that waits."""
        if not self._again and int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            self._again = True
            self._loop.call_soon(self._readable)

    def forget(self, peer: bytes) -> None:
        """A peer is gone for good: should its identity come again, it is looked at anew."""
        self._known.discard(peer)

    def close(self) -> None:
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close(0)

    def _readable(self) -> None:
        self._again = False
        socket, known, table = self._socket, self._known, self._table
        for _ in range(BATCH_MESSAGES):
            try:
                first, parts = receive_parts(socket)
            except zmq.Again:
                break
            peer = first.bytes
            if peer not in known and self._on_new_peer is not None:
                self._introduce(peer, first, self._on_new_peer)
            try:
                message = f.decode(table, parts)
            except f.FrameError as error:
                self._refuse(peer, parts, error)
                continue
            self._on_message(peer, message)
        else:
            self._again = True
            self._loop.call_soon(self._readable)
            return
        self.resume()

    def _introduce(self, peer: bytes, frame: zmq.Frame, on_new_peer: Callable[[bytes, int, int], None]) -> None:
        self._known.add(peer)
        try:
            # On ipc: "localhost:UID:GID:PID", from SO_PEERCRED (libzmq, stream_engine_base.cpp).
            _, uid, _, pid = str(frame.get("Peer-Address")).split(":")
            on_new_peer(peer, int(uid), int(pid))
        except (zmq.ZMQError, ValueError):
            self.counts["unidentified"] += 1

    def _refuse(self, peer: bytes, parts: list[bytes], error: f.FrameError) -> None:
        self.counts["bad_frames"] += 1
        self.counts[f"bad_frames_{error.code}"] += 1
        if self._on_new_peer is None or len(parts) < 2 or len(parts[1]) != f.REQUEST_ID_BYTES:
            return
        failed = f.Failed(0, 0, f.Code.INVALID, str(error))
        self.send(do.ToClient(peer, f.Kind.FAILED, parts[1], failed))

"""The bus for asyncio: requests to models over ZeroMQ, as streams of answer items.

For the library, the gateway and the job journal. A thin shell around `llmos.protocol.client`, which decides, and over
`llmos.dealer`, the socket; here are the clock and the waiting. It must never load gRPC, block the loop, or raise for a
request that failed: a stream ends with its raw final, and what that means is its reader's business.

    async with AsyncBus("ipc:///run/llmosd/front.sock") as bus:
        stream = bus.submit("gemma3-270m", "/v1/completions", body, stream=True)
        async for item in stream:
            ...
        print(stream.final)
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Final, Self
from weakref import WeakValueDictionary

import zmq

from llmos.dealer import Dealer
from llmos.errors import DaemonUnreachable
from llmos.protocol import client as protocol
from llmos.protocol import frames as f

#: Seconds after which a HELLO that was not answered is said again while a connection opens.
HELLO_AGAIN_S: Final = 1.0


class Stream:
    """A request under way: an async iterator over its answer items, then its final.

    Taking items is what acknowledges them, so a slow reader slows itself alone. A stream that is closed or dropped
    before its end is cancelled. One reader at a time.
    """

    def __init__(self, bus: AsyncBus, rid: bytes) -> None:
        self.rid: Final = rid
        #: The daemon has queued it, behind `position` others.
        self.accepted = False
        self.position = 0
        #: Tokens that the items so far stand for, as the worker counts them.
        self.tokens = 0
        #: How it ended, once all items have been taken or `result` has returned; None before.
        self.final: f.Done | f.Failed | None = None
        #: What came with the final: the whole answer when it was not asked for as a stream, or an engine's error.
        self.payload = b""
        self._bus = bus
        self._items: deque[bytes] = deque()
        self._ended: protocol.Ended | None = None
        self._news = asyncio.Event()

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if await self._wait():
            item = self._items.popleft()
            self._bus._consumed(self, 1)
            return item
        raise StopAsyncIteration

    async def take(self) -> list[bytes]:
        """All items that are here, at least one; none at the end. Cheaper than one at a time."""
        if not await self._wait():
            return []
        items = list(self._items)
        self._items.clear()
        self._bus._consumed(self, len(items))
        return items

    async def result(self) -> f.Done | f.Failed:
        """Wait for the end. Items that nobody took by then are dropped."""
        while await self.take():
            pass
        assert self.final is not None
        return self.final

    def cancel(self, reason: str = "") -> None:
        """Ask for an early end. It still ends with a final: CANCELLED, or DONE when that was faster."""
        if self._ended is None:
            self._bus._cancel(self.rid, reason)

    def close(self, reason: str = "its reader has gone") -> None:
        """Cancel it and forget it: it ends here and now, whatever the daemon says."""
        if self._ended is None:
            self._bus._abandon(self.rid, reason)
            self._end(protocol.Ended(self.rid, f.Failed(0, 0, f.Code.CANCELLED, f"cancelled: {reason}"), b""))
        self._items.clear()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if self._ended is None:
            self._bus._dropped(self.rid)

    # -- what the bus does ----------------------------------------------------------------------------------

    def _receive(self, event: protocol.Event) -> None:
        if isinstance(event, protocol.Items):
            self.accepted = True
            self.tokens += event.tokens
            self._items.extend(event.items)
            self._news.set()
        elif isinstance(event, protocol.Ended):
            self._end(event)
        else:
            self.accepted, self.position = True, event.position

    def _end(self, ended: protocol.Ended) -> None:
        self._ended = ended
        self._news.set()

    async def _wait(self) -> bool:
        """True when there is an item, False at the end."""
        while not self._items:
            if self._ended is not None:
                self.final, self.payload = self._ended.final, self._ended.payload
                return False
            self._news.clear()
            await self._news.wait()
        return True


class AsyncBus:
    """A connection to the bus. It outlives the daemon's restarts: what is open then goes on by itself."""

    def __init__(self, address: str) -> None:
        """`address`: where the front socket is, for example ``ipc:///run/llmosd/front.sock``."""
        self.address: Final = address
        # The first byte of an identity must not be 0: those are libzmq's own.
        identity = b"\x01" + os.urandom(f.IDENTITY_BYTES - 1)
        self._identity = identity
        self._protocol = protocol.ClientProtocol(identity, lambda: os.urandom(f.REQUEST_ID_BYTES))
        self._streams: WeakValueDictionary[bytes, Stream] = WeakValueDictionary()
        self._welcomed = asyncio.Event()
        #: Its own due time is kept here: uvloop gives a plain Handle, without one, for what is due at once.
        self._timer: asyncio.Handle | None = None
        self._timer_due = 0.0
        self._dealer: Dealer | None = None

    async def open(self, timeout: float = 5.0) -> None:
        """Connect, and wait until the daemon has said WELCOME. Raises DaemonUnreachable after `timeout` seconds."""
        self._loop = asyncio.get_running_loop()
        self._welcomed.clear()
        try:
            self._dealer = Dealer(self.address, self._identity, self._on_messages, self._on_connected)
        except zmq.ZMQError as error:
            raise DaemonUnreachable(f"cannot connect to {self.address}: {error}. Check the address.") from error
        try:
            async with asyncio.timeout(timeout):
                await self._wait_for_welcome()
        except TimeoutError:
            await self.close()
            message = f"no daemon answered at {self.address} within {timeout:g} s. Is llmosd running there?"
            raise DaemonUnreachable(message) from None
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """End the connection. Streams that are open end as cancelled."""
        for stream in list(self._streams.values()):
            stream.close("the connection was closed")
        if self._timer is not None:
            self._timer.cancel()
        if self._dealer is not None:
            self._dealer.close()
            self._dealer = None

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def welcome(self) -> f.Welcome | None:
        """What the daemon last said of itself and its bounds."""
        return self._protocol.welcome

    @property
    def connected(self) -> bool:
        """Whether there is a daemon at the other end just now."""
        return self._dealer is not None and self._dealer.connected

    @property
    def open_requests(self) -> int:
        return self._protocol.open_requests

    def submit(
        self,
        model: str,
        path: str,
        body: bytes,
        *,
        stream: bool = False,
        tenant: str = "",
        priority: int = 0,
        timeout: float | None = None,
        response_id: str = "",
        created: int = 0,
        seed: int | None = None,
        idempotency_key: str = "",
    ) -> Stream:
        """Send a request to a model: `body` as its engine's `path` takes it. `timeout` in seconds, None: the model's.

        With `stream`, answer items come one by one: each the JSON text of one server-sent event. Without, the whole
        answer is the final's payload.
        """
        if self._dealer is None:
            raise DaemonUnreachable(f"the connection to {self.address} is closed. Open it again.")
        bound = self.welcome.body_max if self.welcome else None
        if bound is not None and len(body) > bound:
            # A message over the daemon's bound would cut this connection, with all that runs over it.
            refused = Stream(self, os.urandom(f.REQUEST_ID_BYTES))
            message = f"the body has {len(body)} bytes, the daemon takes {bound}. Send less."
            refused._end(protocol.Ended(refused.rid, f.Failed(0, 0, f.Code.TOO_LARGE, message), b""))
            return refused
        now = time.monotonic()
        header = f.Submit(
            model,
            path,
            stream,
            tenant,
            priority,
            idempotency_key=idempotency_key,
            seed=seed,
            response_id=response_id,
            created=created,
        )
        rid = self._protocol.submit(header, body, now, None if timeout is None else now + timeout)
        request = self._streams[rid] = Stream(self, rid)
        self._flush()
        return request

    # -- what streams do ------------------------------------------------------------------------------------

    def _consumed(self, stream: Stream, count: int) -> None:
        if stream._ended is None:
            self._protocol.consumed(stream.rid, count)
            if self._protocol.outgoing:
                self._flush()

    def _cancel(self, rid: bytes, reason: str) -> None:
        self._protocol.cancel(rid, reason)
        self._flush()

    def _abandon(self, rid: bytes, reason: str) -> None:
        self._protocol.cancel(rid, reason)
        self._protocol.forget(rid)
        self._flush()

    def _dropped(self, rid: bytes) -> None:
        """A stream was garbage: on whatever thread, and perhaps after the loop."""
        if self._dealer is None or self._loop.is_closed():
            return
        self._loop.call_soon_threadsafe(self._abandon, rid, "its reader has gone")

    # -- the connection -------------------------------------------------------------------------------------

    async def _wait_for_welcome(self) -> None:
        while True:
            try:
                async with asyncio.timeout(HELLO_AGAIN_S):
                    await self._welcomed.wait()
                    return
            except TimeoutError:
                self._on_connected()

    def _on_connected(self) -> None:
        """A handshake succeeded, with a daemon that may be a new one."""
        self._protocol.connected(time.monotonic())
        self._flush()

    def _on_messages(self, messages: list[list[bytes]]) -> None:
        now = time.monotonic()
        for parts in messages:
            self._deliver(self._protocol.receive(parts, now))
        if self._protocol.welcome is not None:
            self._welcomed.set()
        self._flush()

    def _flush(self) -> None:
        """Send what the protocol wants to say, and see to it that no deadline of its is missed."""
        if self._dealer is not None:
            self._dealer.send(self._protocol.outgoing)
            self._arm()

    def _arm(self) -> None:
        due = self._protocol.deadline()
        if due is None:
            return
        delay = max(0.0, due - time.monotonic())
        if self._timer is not None:
            # An early tick is harmless and cheaper than a new timer for each message.
            if self._timer_due <= due:
                return
            self._timer.cancel()
        self._timer_due = due
        self._timer = self._loop.call_later(delay, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._deliver(self._protocol.tick(time.monotonic()))
        self._flush()

    def _deliver(self, events: list[protocol.Event]) -> None:
        for event in events:
            stream = self._streams.get(event.rid)
            if stream is not None:
                stream._receive(event)

"""The client's half of the bus: requests survive lost frames, a restarted daemon and a lost connection.

For the library and the gateway. Pure: the caller owns the socket and the clock, feeds `receive` what arrived and
`tick` the time, and sends what `outgoing` holds. It must never block, read a clock or draw a random number.

**Theory of operation.** This side is the log. It keeps a request's body, and every answer item it received, until
the final has been acknowledged; so whatever is lost elsewhere can be asked for again. Answer items are numbered per
request; `have_seq` is the number wanted next, and only that one is ever delivered, so nothing is delivered twice or
out of order. Three things bring back what was lost:

- a SUBMIT that was not ACCEPTED in time is sent again;
- a HELLO lists open requests with their `have_seq`; the daemon answers with those it does not know, which are
  submitted again with ticket and prefix, and has the workers repeat what is missing of the others. At each new
  connection it lists all of them, later those with a gap in their numbers and those that were silent for long. With
  it go what else may have been lost: their acknowledgements and cancellations;
- a final that comes again for a request already ended is acknowledged again.

All items of an answer come from one attempt. What an older one says is old news; and where a newer one begins after
items of an older were delivered, the two need not be the same words, so the request ends as `worker_lost`.

A final travels at once, so that the engine's slot is free however slowly the items before it are read; it is kept
here until they have come.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgspec

from llmos.protocol import frames as f
from llmos.protocol.host import WINDOW_BYTES

#: Seconds before an unanswered SUBMIT is sent again; doubles up to the maximum.
RESEND_S: Final = 1.0
RESEND_MAX_S: Final = 8.0
#: Seconds of silence over open requests after which a HELLO asks for news.
SILENCE_S: Final = 5.0
#: The same once the final is here and items before it are not, though the window would let them through.
MISSING_S: Final = 0.5
#: Least seconds between two HELLOs that a gap provokes.
GAP_S: Final = 0.05
#: Seconds past its deadline that a request waits for the daemon to say so itself.
DEADLINE_GRACE_S: Final = 1.0


class Accepted(msgspec.Struct, frozen=True):
    """The daemon has queued the request."""

    rid: bytes
    position: int


class Items(msgspec.Struct, frozen=True):
    """Answer items, in order, each delivered once."""

    rid: bytes
    items: list[bytes]
    tokens: int


class Ended(msgspec.Struct, frozen=True):
    """The request is over. Comes exactly once a request, after all its items."""

    rid: bytes
    final: f.Done | f.Failed
    payload: bytes


Event = Accepted | Items | Ended


class _Open:
    """A request that has not ended."""

    __slots__ = (
        "accepted", "acked", "attempt", "body", "cancelled", "consumed", "deadline", "final", "have_seq", "heard_at",
        "prefix", "resend_at", "resend_s", "submit", "ticket", "unacked_bytes",
    )  # fmt: skip

    def __init__(self, submit: f.Submit, body: bytes, deadline: float | None, now: float) -> None:
        self.submit = submit
        self.body = body
        #: Monotonic seconds at which the answer is no longer wanted.
        self.deadline = deadline
        self.prefix: list[bytes] = []
        self.have_seq = 0
        #: Items that the application has taken, and those of them that were acknowledged.
        self.consumed = 0
        self.acked = 0
        self.unacked_bytes = 0
        #: The newest attempt that was heard of.
        self.attempt = 0
        #: The reason, once it was cancelled here: said again until the final comes.
        self.cancelled: str | None = None
        self.ticket = b""
        self.accepted = False
        #: The final, when it came ahead of items that the window still holds back.
        self.final: Ended | None = None
        self.resend_s = RESEND_S
        self.resend_at = now + RESEND_S
        self.heard_at = now


class ClientProtocol:
    """All requests of one connection. See the module for how it works."""

    def __init__(self, incarnation: bytes, new_id: Callable[[], bytes]) -> None:
        """`incarnation`: 16 bytes that name this process's life. `new_id` draws 16 random bytes."""
        #: Messages to send, oldest first; the caller empties it.
        self.outgoing: list[list[bytes]] = []
        #: What the daemon said of itself, None before its first WELCOME.
        self.welcome: f.Welcome | None = None
        #: Messages that were no messages, and items that came twice.
        self.bad_frames = 0
        self.duplicates = 0
        self._incarnation = incarnation
        self._new_id = new_id
        self._open: dict[bytes, _Open] = {}
        #: Requests that the next HELLO is to ask for.
        self._missing: dict[bytes, None] = {}
        self._hello_at = -1e9
        #: Lower bound on the next moment at which `tick` has something to do.
        self._next_tick = float("inf")

    # -- what the application does --------------------------------------------------------------------------

    def submit(self, header: f.Submit, body: bytes, now: float, deadline: float | None = None) -> bytes:
        """Send a request; returns its id. `deadline` in the seconds of `now`."""
        rid = self._new_id()
        request = self._open[rid] = _Open(header, body, deadline, now)
        self._send_submit(rid, request, now)
        return rid

    def cancel(self, rid: bytes, reason: str = "") -> None:
        """The answer is no longer wanted. The request still ends with an Ended, unless `forget` is called too."""
        if (request := self._open.get(rid)) is not None:
            request.cancelled = reason
            self.outgoing.append(f.encode(f.Kind.CANCEL, rid, f.Cancel(reason)))

    def forget(self, rid: bytes) -> None:
        """Nobody waits for this request any more: no further event comes of it."""
        self._open.pop(rid, None)

    def consumed(self, rid: bytes, count: int) -> None:
        """The application has taken `count` more items. A reader that stops taking stops its own stream only."""
        request = self._open.get(rid)
        if request is None:
            return
        taken = request.prefix[request.consumed : request.consumed + count]
        request.consumed += len(taken)
        request.unacked_bytes += sum(map(len, taken))
        window = self.welcome.window if self.welcome else 2
        # Well before either window of the host is full: it may wait for nothing else.
        if request.consumed - request.acked >= max(1, window // 2) or request.unacked_bytes >= WINDOW_BYTES // 4:
            self._acknowledge(rid, request)

    @property
    def open_requests(self) -> int:
        return len(self._open)

    # -- what the connection does ---------------------------------------------------------------------------

    def connected(self, now: float) -> None:
        """A handshake succeeded: with a daemon that may be a new one."""
        self._send_hello(tuple(self._open), now)

    def tick(self, now: float) -> list[Event]:
        """Send again what was not answered in time; end what is past its deadline."""
        if now < self._next_tick:
            return []
        events: list[Event] = []
        for rid, request in list(self._open.items()):
            if request.deadline is not None and now >= request.deadline + DEADLINE_GRACE_S:
                self.cancel(rid, "deadline")
                message = "the deadline passed without an answer from the daemon"
                events.append(self._give_up(rid, request, f.Code.DEADLINE_EXCEEDED, message))
            elif not request.accepted and now >= request.resend_at:
                request.resend_s = min(request.resend_s * 2, RESEND_MAX_S)
                self._send_submit(rid, request, now)
            elif request.accepted and now >= request.heard_at + self._patience(request):
                request.heard_at = now
                self._missing[rid] = None
            elif request.cancelled is not None and now >= request.resend_at:
                request.resend_at = now + RESEND_S
                self.cancel(rid, request.cancelled)
        self._ask(now)
        self._next_tick = self._earliest(now)
        return events

    def deadline(self) -> float | None:
        """When `tick` must be called next, or None while nothing is open."""
        return self._next_tick if self._open else None

    def receive(self, parts: list[bytes], now: float) -> list[Event]:
        """What one message from the daemon means. Never raises for what arrives."""
        try:
            message = f.decode(f.DAEMON_TO_CLIENT, parts)
            return self._receive(message, now)
        except f.FrameError:
            self.bad_frames += 1
            return []

    # -- inside ---------------------------------------------------------------------------------------------

    def _receive(self, message: f.Message, now: float) -> list[Event]:
        header = message.header
        if isinstance(header, f.Welcome):
            self.welcome = header
            for rid in header.unknown:
                if (request := self._open.get(rid)) is not None:
                    self._send_submit(rid, request, now)
            return []
        rid = message.rid
        request = self._open.get(rid)
        if request is None:
            # Ended here, and its acknowledgement was lost: say it again, or the answer is kept for ever.
            if isinstance(header, f.Done | f.Failed):
                self.outgoing.append(f.encode(f.Kind.ACK, rid, f.Ack(header.seq + 1)))
            return []
        request.heard_at = now
        if isinstance(header, f.Chunk):
            return self._chunk(rid, request, header, message.payload, now)
        if isinstance(header, f.Accepted):
            first = not request.accepted
            request.accepted, request.ticket = True, header.ticket
            request.resend_s = RESEND_S
            return [Accepted(rid, header.position)] if first else []
        assert isinstance(header, f.Done | f.Failed)
        if header.attempt and not self._is_of_one_answer(request, header.attempt):
            return self._mixed(rid, request, header.attempt)
        request.accepted = True
        request.final = Ended(rid, header, b"".join(message.payload))
        self._next_tick = min(self._next_tick, now + MISSING_S)
        return self._end(rid, request)

    def _end(self, rid: bytes, request: _Open) -> list[Event]:
        """The final, if it is here and nothing before it is still to come."""
        ended = request.final
        if ended is None or (ended.final.seq > request.have_seq and ended.final.attempt):
            return []
        self.outgoing.append(f.encode(f.Kind.ACK, rid, f.Ack(ended.final.seq + 1)))
        del self._open[rid]
        return [ended]

    def _chunk(self, rid: bytes, request: _Open, header: f.Chunk, payload: list[bytes], now: float) -> list[Event]:
        request.accepted = True
        if header.attempt != request.attempt and not self._is_of_one_answer(request, header.attempt):
            return self._mixed(rid, request, header.attempt)
        skip = request.have_seq - header.first_seq
        if skip >= header.count:
            self.duplicates += header.count
            return []
        if skip < 0:
            self._missing[rid] = None
            self._ask(now)
            return []
        if len(payload) != 1:
            raise f.FrameError("payload", f"CHUNK has {len(payload)} payloads, not 1")
        items = f.split(payload[0], header.count, header.sizes)[skip:]
        self.duplicates += skip
        request.prefix.extend(items)
        request.have_seq += len(items)
        return [Items(rid, items, header.tokens), *self._end(rid, request)]

    def _is_of_one_answer(self, request: _Open, attempt: int) -> bool:
        """Whether what this attempt makes belongs to the items that were delivered."""
        if attempt < request.attempt or (attempt > request.attempt and request.have_seq):
            return False
        if attempt > request.attempt:
            request.attempt, request.final = attempt, None
        return True

    def _mixed(self, rid: bytes, request: _Open, attempt: int) -> list[Event]:
        """An attempt speaks whose items do not go with those delivered."""
        if attempt < request.attempt:
            self.duplicates += 1
            return []
        self.cancel(rid, "begun again")
        message = f"the request was begun again after {request.have_seq} items of its answer had come"
        return [self._give_up(rid, request, f.Code.WORKER_LOST, message)]

    def _give_up(self, rid: bytes, request: _Open, code: f.Code, message: str) -> Ended:
        """End a request from here. What the daemon still says of it is acknowledged and dropped."""
        del self._open[rid]
        return Ended(rid, f.Failed(0, request.have_seq, code, message), b"")

    def _ask(self, now: float) -> None:
        """Ask for what is missing: now, or when the last HELLO is long enough ago."""
        if not self._missing:
            return
        if now >= self._hello_at + GAP_S:
            self._send_hello(tuple(self._missing), now)
        else:
            self._next_tick = min(self._next_tick, self._hello_at + GAP_S)

    def _patience(self, request: _Open) -> float:
        """Seconds of silence after which to ask for news of a request."""
        window = self.welcome.window if self.welcome else 0
        held_back = request.have_seq - request.acked >= window // 2
        return SILENCE_S if request.final is None or held_back else MISSING_S

    def _send_hello(self, rids: tuple[bytes, ...], now: float) -> None:
        self._hello_at = now
        self._missing.clear()
        asked = [(rid, self._open[rid]) for rid in rids if rid in self._open]
        waiting = tuple(f.OpenRequest(rid, request.have_seq, request.ticket) for rid, request in asked)
        self.outgoing.append(f.encode(f.Kind.HELLO, b"", f.ClientHello(self._incarnation, waiting)))
        for rid, request in asked:
            self._acknowledge(rid, request)

    def _acknowledge(self, rid: bytes, request: _Open) -> None:
        """Say, or say again, how far the application has come."""
        if request.consumed:
            request.acked = request.consumed
            request.unacked_bytes = 0
            self.outgoing.append(f.encode(f.Kind.ACK, rid, f.Ack(request.acked)))

    def _send_submit(self, rid: bytes, request: _Open, now: float) -> None:
        request.accepted = False
        request.heard_at = now
        request.resend_at = now + request.resend_s
        self._next_tick = min(self._next_tick, request.resend_at)
        if request.deadline is not None:
            self._next_tick = min(self._next_tick, request.deadline + DEADLINE_GRACE_S)
        remaining_ms = 0 if request.deadline is None else max(1, int((request.deadline - now) * 1000))
        header = request.submit
        if remaining_ms or request.have_seq or request.ticket:
            header = msgspec.structs.replace(
                header,
                remaining_ms=remaining_ms,
                have_seq=request.have_seq,
                ticket=request.ticket,
                prefix_sizes=tuple(map(len, request.prefix)),
            )
        payload = [request.body, b"".join(request.prefix)] if request.prefix else [request.body]
        self.outgoing.append(f.encode(f.Kind.SUBMIT, rid, header, *payload))
        self._acknowledge(rid, request)

    def _earliest(self, now: float) -> float:
        earliest = float("inf")
        for request in self._open.values():
            due = request.heard_at + self._patience(request) if request.accepted else request.resend_at
            if request.cancelled is not None:
                due = min(due, request.resend_at)
            if request.deadline is not None:
                due = min(due, request.deadline + DEADLINE_GRACE_S)
            earliest = min(earliest, due)
        if self._missing:
            earliest = min(earliest, self._hello_at + GAP_S)
        return max(earliest, now + GAP_S)

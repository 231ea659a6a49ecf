"""The worker host's half of the bus: an answer is kept until the client has it.

For the worker hosts. Pure: the caller owns the socket, the clock and the engine; it feeds `receive` what arrived,
carries out the commands that come back, reports what the engine made with `item`, `done` and `failed`, and sends what
`outgoing` holds after `flush`. It must never block, read a clock or start anything.

**Theory of operation.** A request's answer items are numbered. They stay here until the client acknowledged them, so a
new daemon, or a client that lost frames, can have them again: a RUN that repeats the current attempt means "send
again from first_seq". An attempt with a higher number replaces the one before it; a lower one is old news. At most
`window` items of a request travel unacknowledged: a slow reader fills nothing but its own request, and the engine is
read to its end all the same, up to `answer_max`; the final does not wait for the window, so the slot is free at once.

While anything is held here, a HELLO every HEARTBEAT_S says what: the daemon asks for what it misses with a RUN of the
same attempt, and gives RELEASE for what nobody wants. No other message is ever repeated by this side. A RUN without a
body asks only to send again; where nothing is held any more it is answered with FAILED, and the engine is not asked.
"""

from __future__ import annotations

from collections import deque
from itertools import islice
from typing import Final, NamedTuple

import msgspec

from llmos.protocol import frames as f

#: Seconds that a finished answer is kept for a client that does not come for it.
LINGER_S: Final = 600.0
#: Seconds between two HELLOs while answers are held here, or none was answered: sign of life, and list of what is held.
HEARTBEAT_S: Final = 1.0
#: Bytes of a request's answer that may be under way unacknowledged, whatever the number of items.
WINDOW_BYTES: Final = 1 << 20
#: Until the daemon has said WELCOME.
WINDOW_UNKNOWN: Final = 16
ANSWER_MAX_UNKNOWN: Final = 64 << 20


class StartRun(msgspec.Struct, frozen=True):
    """Give this request to the engine."""

    rid: bytes
    run: f.Run
    body: bytes


class StopRun(msgspec.Struct, frozen=True):
    """Take this request away from the engine, now. Its end is settled here: nothing that it still says counts."""

    rid: bytes
    attempt: int
    reason: str


class Told(msgspec.Struct, frozen=True):
    """DRAIN, SLEEP, WAKE, or PREEMPT of a request."""

    kind: f.Kind
    rid: bytes = b""


Command = StartRun | StopRun | Told


class _Item(NamedTuple):
    payload: bytes
    tokens: int


class _Held:
    """A request that runs here, or whose answer is still kept."""

    __slots__ = (
        "acked", "attempt", "final", "final_at", "final_due", "final_kind", "final_payload", "items", "kept_bytes",
        "next_seq", "sent_bytes", "sent_seq",
    )  # fmt: skip

    def __init__(self, attempt: int, first_seq: int) -> None:
        self.attempt = attempt
        #: Items from number `acked` to `next_seq` - 1.
        self.items: deque[_Item] = deque()
        self.kept_bytes = 0
        self.acked = first_seq
        #: The next item to send, and the next to be made.
        self.sent_seq = first_seq
        self.next_seq = first_seq
        #: Bytes of the items that are under way: from `acked` to `sent_seq` - 1.
        self.sent_bytes = 0
        self.final: f.Done | f.Failed | None = None
        self.final_kind = f.Kind.DONE
        self.final_payload = b""
        #: When the final was made, or an acknowledgement came after it.
        self.final_at = 0.0
        #: The final is to be sent, for the first time or again.
        self.final_due = False


class HostProtocol:
    """All requests of one worker. See the module for how it works."""

    def __init__(self, incarnation: bytes, token: bytes, pid: int, slots: int) -> None:
        #: Messages to send, oldest first; the caller empties it.
        self.outgoing: list[list[bytes]] = []
        self.bad_frames = 0
        self.stale = 0
        self.status = f.Status(f.Phase.LOADING, slots=slots)
        self._incarnation = incarnation
        self._token = token
        self._pid = pid
        self._held: dict[bytes, _Held] = {}
        #: Requests of which something is to be sent, in order.
        self._dirty: dict[bytes, None] = {}
        self._window = WINDOW_UNKNOWN
        self._answer_max = ANSWER_MAX_UNKNOWN
        self._beat_at = 0.0
        self._welcomed = False
        #: The latest moment this end was told of.
        self._now = 0.0

    # -- what the connection does ---------------------------------------------------------------------------

    def connected(self) -> None:
        """A handshake succeeded: with a daemon that may be a new one."""
        self._welcomed = False
        self._say_hello()

    def _say_hello(self) -> None:
        held = tuple(
            f.HeldRequest(rid, h.attempt, h.acked, h.next_seq, h.final is not None) for rid, h in self._held.items()
        )
        hello = f.WorkerHello(self._incarnation, self._token, self._pid, self.status.phase, self.status.slots, held)
        self.outgoing.append(f.encode(f.Kind.HELLO, b"", hello))

    def receive(self, parts: list[bytes]) -> list[Command]:
        """What one message from the daemon means. Never raises for what arrives."""
        try:
            message = f.decode(f.DAEMON_TO_WORKER, parts)
        except f.FrameError:
            self.bad_frames += 1
            return []
        header, rid = message.header, message.rid
        if isinstance(header, f.Run):
            return self._run(rid, header, message.payload)
        if isinstance(header, f.Ack):
            self._ack(rid, header.seq)
            return []
        if isinstance(header, f.Cancel):
            return self._cancel(rid, header.reason)
        if isinstance(header, f.Welcome):
            self._window, self._answer_max, self._welcomed = header.window, header.answer_max, True
            self._dirty.update(dict.fromkeys(self._held))
            self._say_status()
            return []
        if message.kind is f.Kind.HELLO:
            self._say_hello()
            return []
        if message.kind is f.Kind.RELEASE:
            held = self._held.pop(rid, None)
            return [] if held is None or held.final else [StopRun(rid, held.attempt, "released")]
        return [Told(message.kind, rid)]

    # -- what the engine does -------------------------------------------------------------------------------

    def set_status(self, phase: str, progress: float = -1.0, detail: str = "", engine_pid: int = 0) -> None:
        self.status = f.Status(phase, progress, self.status.slots, detail, engine_pid)
        self._say_status()

    def item(self, rid: bytes, attempt: int, payload: bytes, tokens: int = 1) -> bool:
        """The engine made one answer item. False: it is not wanted, or too much; stop making more."""
        held = self._current(rid, attempt)
        if held is None:
            return False
        if held.kept_bytes + len(payload) > self._answer_max:
            self._too_large(rid, attempt)
            return False
        held.items.append(_Item(payload, tokens))
        held.kept_bytes += len(payload)
        held.next_seq += 1
        self._dirty[rid] = None
        return True

    def done(self, rid: bytes, attempt: int, done: f.Done, payload: bytes, now: float) -> None:
        """The engine finished. `done.seq` is filled in here."""
        if len(payload) > self._answer_max:
            self._too_large(rid, attempt)
        else:
            self._finish(rid, attempt, f.Kind.DONE, done, payload, now)

    def failed(self, rid: bytes, attempt: int, failed: f.Failed, payload: bytes, now: float) -> None:
        """The request failed here. `failed.seq` is filled in here."""
        self._finish(rid, attempt, f.Kind.FAILED, failed, payload, now)

    def next_seq(self, rid: bytes) -> int:
        """The number of the next answer item of a request that is held here, or 0."""
        held = self._held.get(rid)
        return held.next_seq if held else 0

    @property
    def unfinished(self) -> int:
        """Requests that the engine still works on."""
        return sum(held.final is None for held in self._held.values())

    @property
    def kept(self) -> int:
        """Requests whose answer is still held, finished or not."""
        return len(self._held)

    # -- time -----------------------------------------------------------------------------------------------

    def flush(self, now: float) -> None:
        """Turn what was made since the last flush into messages, several items in one, as far as windows go."""
        self._now = now
        for rid in self._dirty:
            held = self._held.get(rid)
            if held is not None:
                self._send_items(rid, held)
                if held.final_due and held.final is not None:
                    held.final_due = False
                    self.outgoing.append(f.encode(held.final_kind, rid, held.final, held.final_payload))
        self._dirty.clear()

    def tick(self, now: float) -> None:
        """Forget answers that nobody came for, and give the sign of life."""
        self._now = now
        for rid, held in list(self._held.items()):
            if held.final is not None and now >= held.final_at + LINGER_S:
                del self._held[rid]
        if now >= self._beat_at and (self._held or not self._welcomed):
            self._beat_at = now + HEARTBEAT_S
            self._say_hello()

    # -- inside ---------------------------------------------------------------------------------------------

    def _run(self, rid: bytes, run: f.Run, payload: list[bytes]) -> list[Command]:
        held = self._held.get(rid)
        if held is not None and run.attempt < held.attempt:
            self.stale += 1
            return []
        if held is not None and run.attempt == held.attempt:
            held.sent_seq = min(max(run.first_seq, held.acked), held.next_seq)
            under_way = islice(held.items, held.sent_seq - held.acked)
            held.sent_bytes = sum(len(item.payload) for item in under_way)
            held.final_due = held.final is not None
            self._dirty[rid] = None
            return []
        self._held[rid] = _Held(run.attempt, max(0, run.first_seq))
        if not payload:
            message = "the answer is not kept here any more"
            failed = f.Failed(run.attempt, 0, f.Code.WORKER_LOST, message)
            self._finish(rid, run.attempt, f.Kind.FAILED, failed, b"", self._now)
            return [] if held is None or held.final else [StopRun(rid, held.attempt, "replaced by a later attempt")]
        start = StartRun(rid, run, payload[0])
        if held is not None and held.final is None:
            return [StopRun(rid, held.attempt, "replaced by a later attempt"), start]
        return [start]

    def _ack(self, rid: bytes, seq: int) -> None:
        held = self._held.get(rid)
        if held is None:
            return
        if held.final is not None and seq > held.final.seq:
            del self._held[rid]
            return
        while held.acked < min(seq, held.next_seq):
            size = len(held.items.popleft().payload)
            held.kept_bytes -= size
            if held.acked < held.sent_seq:
                held.sent_bytes -= size
            held.acked += 1
        held.sent_seq = max(held.sent_seq, held.acked)
        held.final_at = max(held.final_at, self._now)  # a slow reader is a reader
        self._dirty[rid] = None

    def _cancel(self, rid: bytes, reason: str) -> list[Command]:
        held = self._held.get(rid)
        if held is None or held.final is not None:
            return []
        code = f.Code.DEADLINE_EXCEEDED if reason == f.Code.DEADLINE_EXCEEDED else f.Code.CANCELLED
        failed = f.Failed(held.attempt, 0, code, reason or code)
        self._finish(rid, held.attempt, f.Kind.FAILED, failed, b"", self._now)
        return [StopRun(rid, held.attempt, reason or code)]

    def _current(self, rid: bytes, attempt: int) -> _Held | None:
        held = self._held.get(rid)
        if held is None or held.attempt != attempt or held.final is not None:
            self.stale += 1
            return None
        return held

    def _finish(
        self, rid: bytes, attempt: int, kind: f.Kind, final: f.Done | f.Failed, payload: bytes, now: float
    ) -> None:
        held = self._current(rid, attempt)
        if held is None:
            return
        held.final = msgspec.structs.replace(final, attempt=attempt, seq=held.next_seq)
        held.final_kind, held.final_payload, held.final_at = kind, payload, now
        held.final_due = True
        self._dirty[rid] = None

    def _too_large(self, rid: bytes, attempt: int) -> None:
        message = f"the answer is larger than answer_max, {self._answer_max} bytes"
        self._finish(rid, attempt, f.Kind.FAILED, f.Failed(attempt, 0, f.Code.TOO_LARGE, message), b"", self._now)

    def _send_items(self, rid: bytes, held: _Held) -> None:
        start = held.sent_seq - held.acked
        stop = min(len(held.items), self._window)
        batch: list[_Item] = []
        for item in islice(held.items, start, stop):
            # The last item may reach beyond the window: one larger than what is left must not wait for ever.
            if held.sent_bytes >= WINDOW_BYTES:
                break
            held.sent_bytes += len(item.payload)
            batch.append(item)
        if not batch:
            return
        sizes = tuple(len(item.payload) for item in batch) if len(batch) > 1 else ()
        tokens = sum(item.tokens for item in batch)
        header = f.Chunk(held.attempt, held.sent_seq, len(batch), sizes, tokens)
        self.outgoing.append(f.encode(f.Kind.CHUNK, rid, header, b"".join([item.payload for item in batch])))
        held.sent_seq += len(batch)

    def _say_status(self) -> None:
        self.outgoing.append(f.encode(f.Kind.STATUS, b"", self.status))

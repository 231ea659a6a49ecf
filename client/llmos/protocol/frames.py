"""The frames of the bus: what travels between clients, the daemon and worker hosts, and how it is written.

The contract is `proto/bus.md`; this is its only implementation. Pure: bytes in, typed headers out. A message is
``[version and kind, request id, header, payload…]``; a header is a msgpack array of the fields declared here, in
this order, so a field may be added at the end and never moved or removed within a version.

Everything that arrives is hostile until `decode` has returned.
"""

from __future__ import annotations

import enum
from typing import Annotated, Final, NamedTuple

import msgspec
from msgspec import Meta

VERSION: Final = 1
REQUEST_ID_BYTES: Final = 16
IDENTITY_BYTES: Final = 16
#: Fields whose text comes from outside and is kept: names, tenants, keys.
NAME_CHARS_MAX: Final = 256
#: Numbers of a header: what a double holds exactly, so that nobody who counts on overflows.
Number = Annotated[int, Meta(ge=0, le=2**53)]
Priority = Annotated[int, Meta(ge=-(2**31), lt=2**31)]


class Kind(enum.IntEnum):
    """The second byte of a message. Values are the wire's and never reused."""

    HELLO = 1
    WELCOME = 2
    SUBMIT = 3
    ACCEPTED = 4
    RUN = 5
    CHUNK = 6
    YIELD = 7
    DONE = 8
    FAILED = 9
    CANCEL = 10
    ACK = 11
    RELEASE = 12
    PREEMPT = 13
    DRAIN = 14
    SLEEP = 15
    WAKE = 16
    STATUS = 17


class Code(enum.StrEnum):
    """Why a request failed. The gateway turns these into HTTP statuses, the library into exceptions."""

    NOT_FOUND = "not_found"  # no such model
    INVALID = "invalid"  # the message or the body cannot be understood
    TOO_LARGE = "too_large"  # body or answer over the bound
    QUEUE_FULL = "queue_full"  # the model's queue is at its bound; retry_after_ms says when
    DEADLINE_EXCEEDED = "deadline_exceeded"  # the request's own time ran out
    CANCELLED = "cancelled"  # by its client, or by an operator
    UNAVAILABLE = "unavailable"  # the model cannot be started: reason in the message
    WORKER_LOST = "worker_lost"  # the worker died after it had begun to answer
    ENGINE_ERROR = "engine_error"  # the engine answered with an error; its own body is the payload
    UNSUPPORTED = "unsupported"  # this model's engine has no such function
    INTERNAL = "internal"  # a fault of llmosd's own


class Phase(enum.StrEnum):
    """What a host says of its engine."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    ASLEEP = "asleep"
    FAILED = "failed"


class Header(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A message's second part. Written as a msgpack array of its fields."""


class OpenRequest(Header, frozen=True, array_like=True, gc=False):
    """A request that a client still waits for, as it tells a daemon that may not know it."""

    rid: bytes
    #: Answer items the client already holds: it wants number `have_seq` next.
    have_seq: Number
    ticket: bytes = b""


class ClientHello(Header, frozen=True, array_like=True, gc=False):
    incarnation: bytes
    open: tuple[OpenRequest, ...] = ()


class Welcome(Header, frozen=True, array_like=True, gc=False):
    #: Differs between two lives of the daemon.
    epoch: Number
    #: Largest body a SUBMIT may carry, in bytes.
    body_max: Number
    #: Answer items a worker may have under way to one client, unacknowledged.
    window: Number
    #: Largest answer that is kept for a request, in bytes.
    answer_max: Number
    #: Of the HELLO's open requests, those this daemon does not know: submit them again.
    unknown: tuple[bytes, ...] = ()


class Submit(Header, frozen=True, array_like=True, gc=False):
    model: str
    #: The engine's HTTP path, e.g. ``/v1/completions``.
    path: str
    #: Whether the answer is wanted item by item.
    stream: bool = False
    tenant: str = ""
    #: Larger is sooner; 0 is normal.
    priority: Priority = 0
    #: Time left to the request when this was sent; 0: the model's own request_timeout.
    remaining_ms: Number = 0
    idempotency_key: str = ""
    seed: int | None = None
    #: ``id`` and ``created`` of the rendered answer, so that a second run renders the same bytes.
    response_id: str = ""
    created: Number = 0
    have_seq: Number = 0
    ticket: bytes = b""
    #: Lengths in bytes of the answer items in the prefix, the message's second payload.
    prefix_sizes: tuple[Number, ...] = ()


class Accepted(Header, frozen=True, array_like=True, gc=False):
    #: Signed place in the queue, good at the next daemon too.
    ticket: bytes
    #: Requests ahead of this one when it was accepted.
    position: Number


class Run(Header, frozen=True, array_like=True, gc=False):
    #: Fences: what an older attempt says is dropped.
    attempt: Number
    #: Number of the first answer item this attempt makes, or is asked to send again.
    first_seq: Number
    path: str
    stream: bool
    seed: int | None = None
    response_id: str = ""
    created: Number = 0
    remaining_ms: Number = 0
    #: Upper bound on generated tokens; 0: none.
    max_tokens: Number = 0
    #: Where an earlier attempt stopped, in the driver's own terms; empty: from the beginning.
    continuation: bytes = b""
    #: Tokens after which the host may yield; 0: to the end.
    quantum: Number = 0


class Chunk(Header, frozen=True, array_like=True, gc=False):
    attempt: Number
    first_seq: Number
    #: Answer items in the payload: numbers first_seq … first_seq + count - 1.
    count: Number
    #: Lengths of the items in bytes, when there are several.
    sizes: tuple[Number, ...] = ()
    #: Tokens that the items stand for.
    tokens: Number = 0
    token_ids: tuple[Number, ...] = ()


class Yield(Header, frozen=True, array_like=True, gc=False):
    attempt: Number
    next_seq: Number
    continuation: bytes = b""


class Done(Header, frozen=True, array_like=True, gc=False):
    attempt: Number
    #: Its own number: the last item's plus one.
    seq: Number
    #: HTTP status of the answer and its content type; the payload is what was not sent in chunks.
    status: Number = 200
    content_type: str = "application/json"
    prompt_tokens: Number = 0
    completion_tokens: Number = 0
    #: True when the engine reported the counts, False when the host counted.
    tokens_exact: bool = False


class Failed(Header, frozen=True, array_like=True, gc=False):
    #: 0: the daemon says so itself; items that were not delivered are lost.
    attempt: Number
    seq: Number
    code: str
    message: str
    #: HTTP status of the engine's own error, 0 where there was none.
    status: Number = 0
    retry_after_ms: Number = 0
    content_type: str = ""


class Cancel(Header, frozen=True, array_like=True, gc=False):
    reason: str = ""


class Ack(Header, frozen=True, array_like=True, gc=False):
    #: Every item with a smaller number has arrived. Past the final's number: all is done.
    seq: Number


class Empty(Header, frozen=True, array_like=True, gc=False):
    """Header of the kinds that say everything by their kind."""


class HeldRequest(Header, frozen=True, array_like=True, gc=False):
    """A request whose answer, or part of it, a host still holds."""

    rid: bytes
    attempt: Number
    #: Number of the oldest item kept, and of the next to be made.
    kept_from: Number
    next_seq: Number
    #: The last item has been made.
    final: bool


class WorkerHello(Header, frozen=True, array_like=True, gc=False):
    incarnation: bytes
    #: The secret that the daemon gave this worker when it spawned it.
    token: bytes
    pid: Number
    phase: str
    slots: Number
    requests: tuple[HeldRequest, ...] = ()


class Status(Header, frozen=True, array_like=True, gc=False):
    phase: str
    #: Share of the load that is done, 0 to 1, or -1 where the engine does not tell.
    progress: float = -1.0
    slots: Number = 0
    detail: str = ""
    engine_pid: Number = 0


#: Which header each kind has: (sent towards the daemon, sent by the daemon to a client, sent by it to a worker).
FROM_CLIENT: Final[dict[Kind, type[Header]]] = {
    Kind.HELLO: ClientHello,
    Kind.SUBMIT: Submit,
    Kind.CANCEL: Cancel,
    Kind.ACK: Ack,
}
TO_CLIENT: Final[dict[Kind, type[Header]]] = {
    Kind.WELCOME: Welcome,
    Kind.ACCEPTED: Accepted,
    Kind.CHUNK: Chunk,
    Kind.DONE: Done,
    Kind.FAILED: Failed,
}
FROM_WORKER: Final[dict[Kind, type[Header]]] = {
    Kind.HELLO: WorkerHello,
    Kind.STATUS: Status,
    Kind.CHUNK: Chunk,
    Kind.YIELD: Yield,
    Kind.DONE: Done,
    Kind.FAILED: Failed,
}
TO_WORKER: Final[dict[Kind, type[Header]]] = {
    Kind.HELLO: Empty,
    Kind.WELCOME: Welcome,
    Kind.RUN: Run,
    Kind.PREEMPT: Empty,
    Kind.CANCEL: Cancel,
    Kind.ACK: Ack,
    Kind.RELEASE: Empty,
    Kind.DRAIN: Empty,
    Kind.SLEEP: Empty,
    Kind.WAKE: Empty,
}

#: Kinds that are about a request and so carry its id; the others carry an empty one.
ABOUT_A_REQUEST: Final = frozenset(
    {
        Kind.SUBMIT, Kind.ACCEPTED, Kind.RUN, Kind.CHUNK, Kind.YIELD, Kind.DONE,
        Kind.FAILED, Kind.CANCEL, Kind.ACK, Kind.RELEASE, Kind.PREEMPT,
    }
)  # fmt: skip


class FrameError(ValueError):
    """A message that is not of this protocol. `code` says which rule it breaks, for the counters."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Message(NamedTuple):
    """A decoded message. `raw_header` is kept so that it can be passed on without being written again."""

    kind: Kind
    rid: bytes
    header: Header
    payload: list[bytes]
    raw_header: bytes


Table = dict[bytes, tuple[Kind, "msgspec.msgpack.Decoder[Header]"]]
encode_header = msgspec.msgpack.Encoder().encode


def _table(kinds: dict[Kind, type[Header]]) -> Table:
    return {bytes((VERSION, kind)): (kind, msgspec.msgpack.Decoder(header)) for kind, header in kinds.items()}


#: What a receiver accepts, by who sent it.
CLIENT_TO_DAEMON: Final = _table(FROM_CLIENT)
DAEMON_TO_CLIENT: Final = _table(TO_CLIENT)
WORKER_TO_DAEMON: Final = _table(FROM_WORKER)
DAEMON_TO_WORKER: Final = _table(TO_WORKER)

FIRST_FRAME: Final = {kind: bytes((VERSION, kind)) for kind in Kind}


def encode(kind: Kind, rid: bytes, header: Header, *payload: bytes) -> list[bytes]:
    """The frames of one message."""
    return [FIRST_FRAME[kind], rid, encode_header(header), *payload]


def decode(table: Table, frames: list[bytes]) -> Message:
    """Read one message that a peer of `table`'s kind sent.

    Raises FrameError, and nothing else, for anything that is not such a message.
    """
    if len(frames) < 3:
        raise FrameError("too_few_frames", f"a message has at least 3 frames, this one has {len(frames)}")
    known = table.get(frames[0])
    if known is None:
        raise _unknown_first_frame(frames[0])
    kind, decoder = known
    rid = frames[1]
    if len(rid) != (REQUEST_ID_BYTES if kind in ABOUT_A_REQUEST else 0):
        raise FrameError("request_id", f"{kind.name} came with a request id of {len(rid)} bytes")
    try:
        header = decoder.decode(frames[2])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FrameError("header", f"the header of {kind.name} cannot be read: {error}") from None
    return Message(kind, rid, header, frames[3:], frames[2])


def _unknown_first_frame(first: bytes) -> FrameError:
    if len(first) == 2 and first[0] != VERSION:
        return FrameError("version", f"protocol version {first[0]} is not spoken here; this is version {VERSION}")
    return FrameError("kind", f"first frame {first[:8].hex() or '(empty)'} is no kind that this peer may send")


def split(payload: bytes, count: int, sizes: tuple[int, ...]) -> list[bytes]:
    """The `count` answer items that a CHUNK's payload holds.

    Raises FrameError when the sizes do not add up to the payload.
    """
    if count == 1 and not sizes:
        return [payload]
    if len(sizes) != count or min(sizes, default=0) < 0 or sum(sizes) != len(payload):
        raise FrameError("sizes", f"sizes of {len(sizes)} items do not fit {count} items in {len(payload)} bytes")
    items = []
    start = 0
    for size in sizes:
        items.append(payload[start : start + size])
        start += size
    return items

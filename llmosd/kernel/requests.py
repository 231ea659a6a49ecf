"""A request: one call in flight, the thread of this system. Its states and what is counted of it."""

from __future__ import annotations

import enum
import hashlib
import hmac
import struct
from typing import Final

from llmos.protocol import frames as f


class RequestState(enum.StrEnum):
    READY = "ready"  # waits for a slot
    BLOCKED = "blocked"  # waits for a worker to start or wake
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    REJECTED = "rejected"  # never accepted


#: States of a request that a slot is still owed to, or that holds one.
OPEN: Final = frozenset({RequestState.READY, RequestState.BLOCKED, RequestState.RUNNING})

#: No honest number in a message is larger: of items, of tokens.
MANY: Final = 1 << 40

#: How a final's code reads as a state; anything else is `failed`.
ENDED_AS: Final[dict[str, RequestState]] = {
    f.Code.CANCELLED: RequestState.CANCELLED,
    f.Code.DEADLINE_EXCEEDED: RequestState.EXPIRED,
}


class Request:
    """What the kernel knows of one accepted request. Times are the kernel's monotonic seconds."""

    __slots__ = (
        "accepted_at", "attempt", "body", "cancel_reason", "client_acked", "client_at", "confirmed", "dispatched_at",
        "expires_at", "final", "final_seq", "first_item_at", "losses", "lost_peer", "model", "next_seq",
        "order", "peer", "prompt_tokens", "rid", "state", "submit", "tenant", "ticket", "tokens", "worker",
    )  # fmt: skip

    def __init__(
        self,
        rid: bytes,
        submit: f.Submit,
        body: bytes | None,
        model: str,
        now: float,
    ) -> None:
        self.rid = rid
        #: The connection its answer goes to; None while its client is away.
        self.peer: bytes | None = None
        #: While its client is away: the connection that was lost. Its process may yet turn out to have ended.
        self.lost_peer: bytes | None = None
        self.submit = submit
        #: None while it is known from its worker alone.
        self.body = body
        self.model = model
        self.tenant = submit.tenant
        self.state = RequestState.READY
        #: Its place in the queue: smaller is sooner. Microseconds of the kernel's clock, made unique.
        self.order = 0
        self.ticket = b""
        self.attempt = 0
        #: The worker has shown that it holds this attempt.
        self.confirmed = False
        #: Name of the worker that runs it, or still holds its answer.
        self.worker: str | None = None
        #: The next answer item to pass on, and how far the client has acknowledged.
        self.next_seq = submit.have_seq
        self.client_acked = submit.have_seq
        #: Workers that died under it.
        self.losses = 0
        self.tokens = 0
        self.prompt_tokens = 0
        self.accepted_at = now
        #: When its client last said anything of it.
        self.client_at = now
        self.dispatched_at = 0.0
        self.first_item_at = 0.0
        self.expires_at = 0.0
        self.cancel_reason = ""
        #: Number of the final, once there is one; the final itself only where no worker keeps it.
        self.final_seq = -1
        self.final: f.Failed | None = None

    @property
    def key(self) -> str:
        """The id as people see it."""
        return self.rid.hex()


_TICKET: Final = struct.Struct(">qq")
_MAC_BYTES: Final = 8


def sign_ticket(key: bytes, rid: bytes, order: int, attempt: int) -> bytes:
    """A request's place in the queue, and its attempt number, for a daemon that does not know it any more."""
    body = _TICKET.pack(order, attempt)
    return body + hashlib.blake2b(rid + body, key=key, digest_size=_MAC_BYTES).digest()


def read_ticket(key: bytes, rid: bytes, ticket: bytes) -> tuple[int, int] | None:
    """(order, attempt) of a ticket that this machine's daemon signed for this request, else None."""
    body, mac = ticket[: _TICKET.size], ticket[_TICKET.size :]
    expected = hashlib.blake2b(rid + body, key=key, digest_size=_MAC_BYTES).digest()
    if len(body) != _TICKET.size or not hmac.compare_digest(mac, expected):
        return None
    order, attempt = _TICKET.unpack(body)
    return order, attempt

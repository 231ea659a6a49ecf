"""What the kernel is told once, when it is built. Frozen data."""

from __future__ import annotations

import msgspec


class Params(msgspec.Struct, frozen=True, kw_only=True):
    """Constants of one life of the kernel. Times in seconds, sizes in bytes."""

    #: Differs between two lives of the daemon on this machine and grows: milliseconds since boot.
    epoch: int
    #: Of the jitter in back-off.
    seed: int
    #: Signs tickets; at most 64 bytes, the same in every life of the daemon.
    ticket_key: bytes
    #: Placement rule: first_fit, best_fit or worst_fit.
    placement: str = "best_fit"
    body_max: int = 32 << 20
    #: Answer items a worker may have under way to one client, unacknowledged.
    window: int = 256
    answer_max: int = 64 << 20
    #: How long a request waits for a client that is alive and cannot be reached, or for its acknowledgement.
    resume_timeout: float = 30.0
    #: How long an ended answer is kept for a client that is there and says nothing of it.
    linger: float = 600.0
    #: Accepted requests in all that have not ended.
    requests_max: int = 100_000
    #: How often a request may lose its worker before it is given up: a request can be what kills them.
    losses_max: int = 3
    #: From SIGKILL until a group that is still there counts as unkillable.
    kill_timeout: float = 10.0
    #: How often an unkillable group is killed again.
    unkillable_retry: float = 30.0

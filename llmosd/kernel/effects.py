"""What the kernel wants done: frozen data, carried out by the daemon. An effect never fails silently: whatever comes
of it comes back as an event."""

from __future__ import annotations

import msgspec

from llmos.protocol import frames as f
from llmosd.kernel.ledger import Grant
from llmosd.kernel.spec import Limits, Liveness, ModelSpec, Ready


class Effect(msgspec.Struct, frozen=True):
    """Something to do."""


class ToClient(Effect, frozen=True, gc=False):
    """Send a message to a client. A header that is bytes is passed on as it came."""

    peer: bytes
    kind: f.Kind
    rid: bytes
    header: f.Header | bytes
    payload: tuple[bytes, ...] | list[bytes] = ()


class ToWorker(Effect, frozen=True, gc=False):
    """Send a message to a worker host."""

    peer: bytes
    kind: f.Kind
    rid: bytes
    header: f.Header | bytes
    payload: tuple[bytes, ...] | list[bytes] = ()


class Spawn(Effect, frozen=True):
    """Start a worker. Answered by Spawned or SpawnFailed."""

    worker: str
    incarnation: int
    spec: ModelSpec
    limits: Limits
    grant: Grant


class Signal(Effect, frozen=True):
    """Send a signal to the worker's leader. `stops`: the intent to stop is recorded first."""

    worker: str
    incarnation: int
    signal: int
    stops: bool = False


class NoteDraining(Effect, frozen=True):
    """Put on record that the worker is to end when its requests are done: no later daemon is to start it again."""

    worker: str
    incarnation: int


class KillGroup(Effect, frozen=True):
    """SIGKILL to every process of the worker's group. Answered by Emptied."""

    worker: str
    incarnation: int


class Freeze(Effect, frozen=True):
    worker: str
    incarnation: int
    frozen: bool


class Confine(Effect, frozen=True):
    """Put new limits in force on a worker that runs, and on record with what it holds now."""

    worker: str
    incarnation: int
    limits: Limits
    grant: Grant


class Probe(Effect, frozen=True):
    """Ask a command whether it is ready, or whether it lives, and go on asking; with neither, stop asking. In place of
    what was asked before. Answered by Ready and NotReady, or by Unhealthy."""

    worker: str
    incarnation: int
    ready: Ready | None = None
    liveness: Liveness | None = None


class WatchClient(Effect, frozen=True):
    """Tell when this client's process ends, as ClientLost."""

    peer: bytes
    pid: int


class UnwatchClient(Effect, frozen=True):
    peer: bytes


class KeepHeld(Effect, frozen=True):
    """What is stopped by operators, in full, for the daemon that follows. Before anything that comes of it."""

    models: tuple[str, ...]
    workers: tuple[str, ...]


class Replied(Effect, frozen=True):
    """The answer to an operator's command."""

    call: int
    #: "" when it is done, else one of not_found, refused, invalid.
    refusal: str = ""
    message: str = ""
    #: Names of the workers it concerns.
    workers: tuple[str, ...] = ()


class Happened(Effect, frozen=True):
    """A line of the event log, for people and for `llmos events`."""

    kind: str
    #: What it is about: a worker, a model, or a request's id in hexadecimal.
    subject: str
    message: str
    model: str = ""


class AllDown(Effect, frozen=True):
    """After ShutDown: no worker is left."""

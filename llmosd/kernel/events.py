"""What happens to the kernel: frozen data, made by the daemon from sockets, processes, operators and time.

`peer` is a connection's identity on the bus; `rid` a request's id; `worker` a worker's name; `incarnation` counts the
lives of one worker. `call` is the shell's own number for an operator's command, given back in the `Replied` effect.
"""

from __future__ import annotations

import math

import msgspec

from llmos.protocol import frames as f
from llmosd.kernel.ledger import Capacity, Grant
from llmosd.kernel.restart import ExitStatus
from llmosd.kernel.spec import Limits, ModelSpec


class Event(msgspec.Struct, frozen=True):
    """Something that happened."""


class Tick(Event, frozen=True):
    """Nothing but time passed."""


# -- from clients, over the bus ---------------------------------------------------------------------------------


class ClientSaid(Event, frozen=True, gc=False):
    """A well-formed message from a client."""

    peer: bytes
    message: f.Message


class ClientLost(Event, frozen=True):
    """The client's process ended, so that nobody waits for its answers."""

    peer: bytes
    why: str


class ClientUnreachable(Event, frozen=True):
    """A message could not be delivered: the client may come back."""

    peer: bytes


class ClientIdentified(Event, frozen=True):
    """Who a connection belongs to, as the kernel of the machine tells it. Before its first message."""

    peer: bytes
    uid: int
    pid: int


# -- from worker hosts, over the bus ----------------------------------------------------------------------------


class WorkerSaid(Event, frozen=True, gc=False):
    """A well-formed message from what claims to be a worker host."""

    peer: bytes
    message: f.Message


# -- from the node ----------------------------------------------------------------------------------------------


class Spawned(Event, frozen=True):
    """The worker's process runs its program."""

    worker: str
    incarnation: int
    pid: int
    peer: bytes
    token: bytes


class SpawnFailed(Event, frozen=True):
    """There is no process: `step` says which step of the set-up failed."""

    worker: str
    incarnation: int
    step: str
    reason: str
    #: Trying again cannot help: the command does not exist, say.
    permanent: bool = False


class Adopted(Event, frozen=True):
    """A worker that was alive before the daemon started, with the identity checked.

    One that died while there was no daemon is told of too, with how it `ended`: something of its group may be left,
    and its restart policy counts for this end as for any other.
    """

    worker: str
    incarnation: int
    pid: int
    peer: bytes
    token: bytes
    spec: ModelSpec
    grant: Grant
    limits: Limits
    started_at: float
    #: The recorded intent was to stop it.
    stopping: bool = False
    #: Its processes are stopped by the freezer or by SIGSTOP, and so cannot say HELLO.
    frozen: bool = False
    #: A command that was found to be ready.
    ready: bool = False
    #: The recorded intent was to end it when its requests are done.
    draining: bool = False
    #: How its leader ended, as far as anybody could tell. None: it lives.
    ended: ExitStatus | None = None
    #: As in Exited.
    detail: str = ""


class Exited(Event, frozen=True):
    """The leader of the worker's process group ended. `detail`: the host's own record of how its engine ended."""

    worker: str
    incarnation: int
    status: ExitStatus
    detail: str = ""


class Emptied(Event, frozen=True):
    """No process of the worker's group is left."""

    worker: str
    incarnation: int


class OverLimit(Event, frozen=True):
    """A watched limit was passed: the worker is to be ended with this reason."""

    worker: str
    incarnation: int
    reason: str


class Strained(Event, frozen=True):
    """What holds a worker back, as a sentence: throttled, short of memory. Empty: nothing does any more."""

    worker: str
    incarnation: int
    why: str


class Ready(Event, frozen=True):
    """All that a command was asked before it is ready was answered."""

    worker: str
    incarnation: int


class NotReady(Event, frozen=True):
    """A command was asked, and is not ready. `progressed`: it printed something since it was asked before."""

    worker: str
    incarnation: int
    reason: str
    progressed: bool


class Unhealthy(Event, frozen=True):
    """A command does not answer any more, or it cannot be told whether it is ready: it is to be ended so."""

    worker: str
    incarnation: int
    reason: str


class Counted(Event, frozen=True):
    """The node's devices: what can be given away."""

    capacity: Capacity


class Held(Event, frozen=True):
    """What operators had stopped when an earlier daemon died. Before any Apply and any Adopted."""

    models: tuple[str, ...]
    workers: tuple[str, ...]


# -- from operators ---------------------------------------------------------------------------------------------


class Apply(Event, frozen=True):
    call: int
    spec: ModelSpec


class Remove(Event, frozen=True):
    call: int
    model: str


class Start(Event, frozen=True):
    """`name` is a model or a worker, here and below."""

    call: int
    name: str


class Stop(Event, frozen=True):
    call: int
    name: str
    #: Do not wait for requests that run.
    now: bool = False


class Restarted(Event, frozen=True):
    call: int
    name: str


class Reset(Event, frozen=True):
    call: int
    name: str


class Kill(Event, frozen=True):
    """Send a signal; STOP and CONT freeze and thaw. `name` may also be a request's id in hexadecimal."""

    call: int
    name: str
    signal: int


class SetLimits(Event, frozen=True):
    call: int
    name: str
    #: The limits to change, by name; None gives a limit its default again.
    changes: dict[str, object]


class ShutDown(Event, frozen=True):
    """Stop every worker in order. The effect `AllDown` says when."""

    #: What requires and what is required get their turns within this time.
    within_s: float = math.inf

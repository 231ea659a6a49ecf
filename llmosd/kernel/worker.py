"""A worker, as the kernel knows it, and a model with its workers. Records, no decisions. For the kernel."""

from __future__ import annotations

from typing import NamedTuple

from llmosd.kernel.ledger import Grant
from llmosd.kernel.lifecycle import State
from llmosd.kernel.requests import Request
from llmosd.kernel.restart import ExitStatus
from llmosd.kernel.runqueue import RunQueue
from llmosd.kernel.spec import Limits, ModelSpec


class Ending(NamedTuple):
    """An end that waits for its turn."""

    why: str
    #: Does not wait for requests that run.
    at_once: bool


class Worker:
    """One supervised process tree. Times are the kernel's monotonic seconds."""

    __slots__ = (
        "asked",
        "dispatched_at",
        "ending",
        "engine_pid",
        "exit_status",
        "failure_reason",
        "failures",
        "faulted",
        "heard_at",
        "held",
        "idle_since",
        "in_force",
        "incarnation",
        "killed",
        "last_exit",
        "limits",
        "model",
        "name",
        "on_record",
        "peer",
        "permanent",
        "pid",
        "progress",
        "ready_at",
        "requests",
        "restart_at",
        "restarts",
        "rested",
        "running",
        "slots",
        "spec",
        "start_after",
        "started_at",
        "starts",
        "state",
        "state_since",
        "stop_wanted",
        "strain",
        "token",
        "unheard",
        "why",
    )  # fmt: skip

    def __init__(self, name: str, model: str, spec: ModelSpec) -> None:
        self.name = name
        self.model = model
        #: What it was started with; its model's may have changed since.
        self.spec = spec
        #: What is asked for. What the node was last told besides: other CPUs, where somebody has some of its own.
        self.limits: Limits = spec.limits
        self.in_force: Limits = spec.limits
        self.on_record: Grant | None = None
        self.state = State.STOPPED
        #: Why it is in this state, as a sentence for people.
        self.why = ""
        self.state_since = 0.0
        #: What holds it back while it runs, as a sentence.
        self.strain = ""
        #: Counts its lives: what is said of an earlier one is old news.
        self.incarnation = 0
        self.pid = 0
        self.engine_pid = 0
        self.peer = b""
        self.token = b""
        #: Share of the load done, 0 to 1; -1: unknown.
        self.progress = -1.0
        #: Requests that run here or whose answers are still kept here, and how many of them occupy a slot.
        self.requests: dict[bytes, Request] = {}
        self.running = 0
        self.slots = spec.limits.slots
        #: Stopped by an operator: only an operator starts it again.
        self.held = False
        #: An operator has started it, and it is not started yet: it is, once what it waits for is there.
        self.asked = False
        #: Ended by itself and not to be restarted: only demand or an operator starts it again.
        self.rested = False
        #: Somebody wants this life to end.
        self.stop_wanted = False
        #: How this life is to end, once those that require it are down.
        self.ending: Ending | None = None
        #: Once this life has ended, begin another at once: a restart, or a changed model file.
        self.start_after = False
        #: This life ends by a fault, however clean its exit looks: too slow, over a limit, or its engine is gone.
        self.faulted = False
        #: SIGKILL was sent to this life's group.
        self.killed = False
        #: Adopted, and its host has not said HELLO: nobody knows what runs here.
        self.unheard = False
        #: The cause of this life's end, when it is known better than by its exit status.
        self.failure_reason = ""
        self.permanent = False
        #: How this life ended; and how the last one that ended did, with what is known of the cause.
        self.exit_status: ExitStatus | None = None
        self.last_exit = ""
        #: Failures in a row, restarts in all, and when the recent starts were.
        self.failures = 0
        self.restarts = 0
        self.starts: list[float] = []
        self.started_at = 0.0
        self.ready_at = 0.0
        self.restart_at = 0.0
        self.heard_at = 0.0
        self.dispatched_at = 0.0
        self.idle_since = 0.0

    def begin_life(self, spec: ModelSpec, incarnation: int, now: float) -> None:
        """Forget the life before."""
        if self.spec is not spec:
            self.spec, self.limits, self.slots = spec, spec.limits, spec.limits.slots
        if self.incarnation:
            self.restarts += 1
        self.incarnation = incarnation
        self.pid = self.engine_pid = 0
        self.peer = self.token = b""
        self.stop_wanted = self.start_after = self.rested = self.asked = False
        self.ending = None
        self.faulted = self.killed = self.permanent = self.unheard = False
        self.failure_reason = self.strain = ""
        self.exit_status = None
        self.progress = -1.0
        self.started_at, self.ready_at = now, 0.0


class Hopeless(NamedTuple):
    """Why no worker of a model will be ready without somebody's help: what (it, or its worker), and what of it."""

    what: str
    why: str


class Model:
    """A model with its workers and the requests that wait for it."""

    __slots__ = ("held", "hopeless", "parked", "queue", "removed", "spec", "why", "workers")

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.workers: dict[str, Worker] = {}
        self.queue = RunQueue()
        #: Requests that may be running on an adopted worker that has not said HELLO: not to be run twice.
        self.parked: dict[bytes, Request] = {}
        #: Stopped by an operator.
        self.held = False
        #: Its file is gone: it is forgotten once its workers are down.
        self.removed = False
        #: Why no worker could be started just now.
        self.why = ""
        #: As it was when the model was looked at last.
        self.hopeless: Hopeless | None = None

    def has_room(self) -> bool:
        """Whether it may have another worker. A held one of a time when there could be more of them takes no place."""
        most = max(self.spec.scale.max, self.spec.scale.min)
        surplus = sum(
            worker.held and worker.state is State.STOPPED and int(worker.name.rpartition("@")[2]) > most
            for worker in self.workers.values()
        )
        return len(self.workers) - surplus < most

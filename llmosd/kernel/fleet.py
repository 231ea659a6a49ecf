"""The workers and models, and how a worker's state changes: carries out `lifecycle.TABLE`. For the kernel.

What a worker's state becomes is the table's to say; here is what the actions do, and which deadline each state has.
How many workers there should be is `demand.py`'s to say, and which trigger an event amounts to `supervisor.py`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import msgspec

from llmos.protocol import frames as f
from llmosd.kernel import effects as do
from llmosd.kernel.dependencies import UP, Dependencies, ready
from llmosd.kernel.ledger import Capacity, Ledger
from llmosd.kernel.lifecycle import ALIVE, Action, State, Trigger, step
from llmosd.kernel.params import Params
from llmosd.kernel.pinning import Pinning
from llmosd.kernel.spec import Limits, ModelSpec
from llmosd.kernel.timers import Timers
from llmosd.kernel.units import Seconds
from llmosd.kernel.worker import Ending, Model, Worker

SIGTERM: Final = 15
#: Seconds that the node has to spawn a process, on a machine on which a thousand are to be. The worker's own
#: `timeouts.start` begins when it is there.
SPAWN_S: Final = 300.0
#: Seconds of silence after which a worker that ought to speak is asked for its HELLO.
PROBE_S: Final = 2.0
#: States in which a worker is asked when it is silent: those in which one lost message would make it wait for ever.
_LISTENED_TO: Final = frozenset({State.LOADING, State.WAKING, State.READY, State.DRAINING})
_TOLD: Final = {Action.TELL_DRAIN: f.Kind.DRAIN, Action.TELL_SLEEP: f.Kind.SLEEP, Action.TELL_WAKE: f.Kind.WAKE}


class Fleet:
    """All workers and models of one kernel."""

    def __init__(self, params: Params, out: list[do.Effect], timers: Timers) -> None:
        self.params = params
        self.models: dict[str, Model] = {}
        #: Every name a request may use, to the model's own.
        self.names: dict[str, str] = {}
        self.workers: dict[str, Worker] = {}
        self.by_peer: dict[bytes, Worker] = {}
        self.ledger = Ledger(Capacity(0, 0), params.placement)
        self.pinning = Pinning(self.ledger, self.workers, out)
        #: The devices are known. Nothing is started before, for what lives already must be adopted first.
        self.counted = False
        self.shutting_down = False
        #: Models to be looked at again before the event is done with: a slot, a worker or resources came or went.
        self.changed: dict[str, Model] = {}
        #: Models that wait for resources.
        self.short: dict[str, None] = {}
        self.dependencies = Dependencies(self.models, self.names, self.short, self.ledger)
        #: Set by the kernel: what happens to the requests of a worker that is gone.
        self.on_lost: Callable[[Worker, float], None] = lambda worker, now: None
        self._out = out
        self._timers = timers

    def touch(self, model: Model) -> None:
        """Have a model looked at again before the event is done with."""
        self.changed[model.spec.model] = model

    def touch_around(self, model: Model) -> None:
        """Likewise with those that require it, through others too, and those that it requires."""
        self.touch(model)
        for other in (*self.dependencies.above(model), *self.dependencies.required(model)):
            self.touch(other)

    def touch_short(self) -> None:
        """There may be resources for those who wait for them."""
        for name in self.short:
            self.touch(self.models[name])

    # -- transitions ----------------------------------------------------------------------------------------

    def fire(self, worker: Worker, trigger: Trigger, now: float, why: str = "") -> bool:
        """Apply a trigger to a worker. False: it means nothing in the worker's state."""
        found = step(worker.state, trigger)
        if found is None:
            return False
        state, actions = found
        if state is not worker.state:
            worker.state, worker.state_since, worker.why = state, now, why
            self._out.append(do.Happened(state, worker.name, why, worker.model))
            self._enter(worker, now)
            model = self.models[worker.model]
            if model.spec.requires or self.dependencies.users(model):
                self.touch_around(model)
        elif why:
            worker.why = why
        for action in actions:
            self._act(worker, action, now)
        return True

    def _enter(self, worker: Worker, now: float) -> None:
        """The deadlines of the state just entered."""
        times, state = worker.spec.timeouts, worker.state
        span: Seconds | float | None = {
            State.STARTING: SPAWN_S,
            State.ADOPTED: times.start,
            State.LOADING: times.load,
            State.WAKING: times.load,
            State.DRAINING: times.drain,
            # Ended before it began: the process is to come, and then to go.
            State.STOPPING: times.stop if worker.peer else SPAWN_S,
            State.UNKILLABLE: self.params.unkillable_retry,
        }.get(state)
        if span is None:
            self._timers.cancel(("state", worker.name))
        else:
            self._timers.set(("state", worker.name), now + span)
        if state in _LISTENED_TO:
            worker.heard_at = now
            self._timers.arm(("silence", worker.name), now + PROBE_S)
        if not worker.spec.engine.hosted:
            self._probe(worker)
        if state is State.READY:
            worker.ready_at = worker.ready_at or now
            worker.progress = 1.0
            self.note_idle(worker, now)

    def _probe(self, worker: Worker) -> None:
        """What a command is asked in the state just entered: of one that is frozen or ends, nothing is expected."""
        spec, name, life = worker.spec, worker.name, worker.incarnation
        asked = bool(spec.liveness.http and spec.liveness.interval)
        if worker.state is State.LOADING:
            self._out.append(do.Probe(name, life, ready=spec.ready))
        elif worker.state is State.READY and asked:
            self._out.append(do.Probe(name, life, liveness=spec.liveness))
        elif worker.state in (State.FROZEN, State.STOPPING) and (asked or spec.says_ready):
            self._out.append(do.Probe(name, life))

    def _act(self, worker: Worker, action: Action, now: float) -> None:
        out, name, life = self._out, worker.name, worker.incarnation
        if action is Action.SPAWN:
            grant = self.ledger.grant_of(name)
            assert grant is not None, "a worker is started only with a reservation"
            worker.in_force, worker.on_record = self.pinning.limits(worker), grant
            out.append(do.Spawn(name, life, worker.spec, worker.in_force, grant))
        elif action is Action.TERM:
            out.append(do.Signal(name, life, SIGTERM, stops=True))
        elif action is Action.KILL:
            worker.killed = True
            out.append(do.KillGroup(name, life))
            retry = self.params.unkillable_retry if worker.state is State.UNKILLABLE else self.params.kill_timeout
            self._timers.set(("state", name), now + (retry if worker.peer else SPAWN_S))
        elif action in (Action.FREEZE, Action.THAW):
            out.append(do.Freeze(name, life, action is Action.FREEZE))
        elif action in _TOLD:
            if worker.spec.engine.hosted:
                out.append(do.ToWorker(worker.peer, _TOLD[action], b"", f.Empty()))
            if action is Action.TELL_DRAIN:
                out.append(do.NoteDraining(name, life))
                self.note_drained(worker, now)
        elif action is Action.LOSE_REQUESTS:
            self.on_lost(worker, now)
        elif action is Action.RELEASE:
            self.ledger.release(name)
            self.settle_cpus()
        elif action is Action.SCHEDULE_RESTART:
            self._timers.set(("state", name), worker.restart_at)
        else:
            self.touch(self.models[worker.model])

    # -- starting and ending --------------------------------------------------------------------------------

    def start(self, worker: Worker, now: float) -> str:
        """Reserve and spawn. Returns "", or the reason why not now; then nothing has changed."""
        if self.shutting_down:
            return "is not started: llmosd is shutting down"
        if not self.counted:
            return "waits until the devices are counted"
        spec = self.models[worker.model].spec
        grant = self.ledger.reserve(worker.name, spec.resources, spec.limits.allowed_cpus)
        if isinstance(grant, str):
            return grant
        self.settle_cpus()
        worker.begin_life(spec, max(worker.incarnation, self.params.epoch) + 1, now)
        worker.starts = [*(at for at in worker.starts if at > now - spec.restart.interval), now]
        self.fire(worker, Trigger.START, now, "on its way")
        return ""

    def give_up(self, worker: Worker, now: float, why: str) -> None:
        """A worker cannot be started now: it stays as it is, and does not wait for what its model requires."""
        if worker.state is not State.FAILED:  # that has a cause of its own, which is not to be lost
            worker.why = why
        if worker.state is State.WAITING:
            self.fire(worker, Trigger.STOP, now, why)

    def end(self, worker: Worker, now: float, why: str, *, at_once: bool = False, again: bool = False) -> None:
        """Somebody wants this life over; `again`: and another begun."""
        worker.stop_wanted, worker.start_after, worker.ending, worker.asked = True, again, None, False
        self._timers.cancel(("order", worker.name))
        self.fire(worker, Trigger.STOP if at_once else Trigger.DRAIN, now, why)

    def end_in_order(
        self, workers: list[Worker], now: float, why: str, *, at_once: bool = False, again: bool = False
    ) -> None:
        """`end`, once the workers of those that require them and would be left without are down; these end first."""
        for worker in workers:
            if worker.state not in UP:
                self.end(worker, now, why, at_once=at_once, again=again)
                continue
            model = self.models[worker.model]
            worker.stop_wanted, worker.start_after, worker.ending = True, again, Ending(why, at_once)
            self._timers.set(("order", worker.name), now + self._patience_s(model))
            self.touch_around(model)

    def _patience_s(self, model: Model) -> float:
        """By when those that require a model are down at the latest, each in its own time: no order waits for ever."""
        times = [other.spec.timeouts for other in self.dependencies.above(model)]
        return PROBE_S + sum(one.drain + one.stop + self.params.kill_timeout for one in times)

    def bound_order(self, now: float, within_s: float) -> None:
        """At the end of all: each rank has an equal share of the time, and the next does not wait longer for it."""
        ranks = self.dependencies.ranks()
        shares = 1 + max(ranks.values(), default=0)
        for worker in self.workers.values():
            if worker.ending and within_s < math.inf:
                share = within_s * ranks.get(worker.model, 0) / shares
                self._timers.set(("order", worker.name), now + share)

    def keep_order(self, model: Model, now: float) -> None:
        """Of a model's workers that are to end: end those that require them, or themselves if there is none such."""
        ending = [worker for worker in model.workers.values() if worker.ending]
        if not ending or not self.counted:
            return  # who lives is not known before
        users = [] if ready(model) else self.dependencies.in_use(model)
        for worker in ending:
            assert worker.ending is not None
            why, at_once = worker.ending
            if not users:
                self.end(worker, now, why, at_once=at_once, again=worker.start_after)
                continue
            worker.why = f"{why}; waits for the end of {', '.join(sorted(user.name for user in users))}"
            passed_on = f"requires {model.spec.model}, which is ended: {why}"
            self.end_in_order(
                [user for user in users if not user.stop_wanted],
                now,
                passed_on,
                at_once=at_once,
                again=worker.start_after,
            )
            for user in users if at_once else ():
                if user.state is State.DRAINING:
                    self.end(user, now, user.why, at_once=True, again=user.start_after)
                elif user.ending is not None and not user.ending.at_once:
                    user.ending = Ending(user.ending.why, True)
                    self.touch(self.models[user.model])

    def add(self, model: Model, name: str = "") -> Worker:
        """A new worker of a model, not started."""
        if not name:
            # As systemd names instances: "@" can be in no model's name, so no worker is taken for a model.
            numbers = range(1, len(self.workers) + 2)
            name = next(n for n in (f"{model.spec.model}@{k}" for k in numbers) if n not in self.workers)
        worker = model.workers[name] = self.workers[name] = Worker(name, model.spec.model, model.spec)
        return worker

    def forget(self, model: Model) -> None:
        """A removed model whose workers are all down."""
        for worker in model.workers.values():
            for what in ("state", "silence", "idle", "order", "worn"):
                self._timers.cancel((what, worker.name))
            del self.workers[worker.name]
        for name in [name for name, owner in self.names.items() if owner == model.spec.model]:
            del self.names[name]
        self.dependencies.note(model.spec.model, model.spec.requires, ())
        del self.models[model.spec.model]
        self.short.pop(model.spec.model, None)

    def note_all_down(self) -> None:
        if self.shutting_down and not any(worker.state in ALIVE for worker in self.workers.values()):
            self._out.append(do.AllDown())

    def confine(self, worker: Worker, limits: Limits) -> None:
        """Put limits in force on a worker."""
        worker.limits, worker.slots = limits, limits.slots
        if self.ledger.allow(worker.name, limits.allowed_cpus):
            self.settle_cpus()
            self.touch_short()
            self.pinning.warn(worker)
        self.pinning.confine(worker)

    def settle_cpus(self) -> None:
        """Reservations or what they allow have changed: everybody on the CPUs that it may use."""
        if self.pinning.settle():
            self.touch_short()

    # -- what the requests say ------------------------------------------------------------------------------

    def note_busy(self, worker: Worker, now: float) -> None:
        """The worker was given a request."""
        worker.dispatched_at = now
        if worker.running == 1:
            worker.heard_at = now  # an idle worker's silence was not held against it
            self._timers.arm(("silence", worker.name), now + PROBE_S)

    def note_idle(self, worker: Worker, now: float) -> None:
        """A request ended on the worker or left it, or it just became ready."""
        if worker.running == 0 and worker.state is State.READY:
            self.touch_short()  # it may have to make room
        if worker.requests:
            return
        worker.idle_since = now
        if worker.state is State.READY:
            if worker.spec.kind == "model" and worker.spec.scale.idle_timeout:
                self._timers.arm(("idle", worker.name), now + worker.spec.scale.idle_timeout)
        else:
            self.note_drained(worker, now)

    def note_drained(self, worker: Worker, now: float) -> None:
        if worker.state is State.DRAINING and not worker.requests and not worker.unheard:
            self.fire(worker, Trigger.DRAINED, now, worker.why)


def same_process(old: ModelSpec, new: ModelSpec) -> bool:
    """Whether `new` can be put in force on a worker that was started with `old`, without starting it again."""
    live = msgspec.structs.replace(
        old,
        limits=new.limits,
        scale=new.scale,
        aliases=new.aliases,
        restart=new.restart,
        timeouts=new.timeouts,
        requires=new.requires,
    )
    return live == new

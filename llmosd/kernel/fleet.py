"""The workers: started on demand, supervised, restarted, ended. Carries out `lifecycle.TABLE`; for the kernel.

What a worker's state becomes is the table's to say; here is what the actions do, which deadline each state has, and
which verdict an ended worker gets. How many workers a model should have is `balance`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

from llmos.protocol import frames as f
from llmosd.kernel import effects as do
from llmosd.kernel import events as on
from llmosd.kernel.eviction import victims
from llmosd.kernel.ledger import Capacity, Ledger
from llmosd.kernel.lifecycle import ALIVE, COMING, Action, State, Trigger, step
from llmosd.kernel.params import Params
from llmosd.kernel.restart import ExitStatus, backoff_s, spread, wants_restart
from llmosd.kernel.timers import Timers
from llmosd.kernel.units import Seconds
from llmosd.kernel.worker import Model, Worker

SIGTERM: Final = 15
_ENDING: Final = frozenset({State.STOPPING, State.DRAINING, State.UNKILLABLE})


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
        self.shutting_down = False
        #: Until then nothing is started: workers of an earlier daemon are adopted first.
        self.devices_counted = False
        #: Set by the kernel: what happens to the requests of a worker that is gone, and of a model that has a slot.
        self.on_lost: Callable[[Worker, float], None] = lambda worker, now: None
        self.on_change: Callable[[Model, float], None] = lambda model, now: None
        self._out = out
        self._timers = timers

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
        elif why:
            worker.why = why
        for action in actions:
            self._act(worker, action, now)
        return True

    def _enter(self, worker: Worker, now: float) -> None:
        """The deadline of the state just entered."""
        times = worker.spec.timeouts
        span: Seconds | float | None = {
            State.STARTING: times.start,
            State.ADOPTED: times.start,
            State.LOADING: times.load,
            State.WAKING: times.load,
            State.DRAINING: times.drain,
            State.STOPPING: times.stop,
            State.UNKILLABLE: self.params.unkillable_retry,
        }.get(worker.state)
        if span is None:
            self._timers.cancel(("state", worker.name))
        else:
            self._timers.set(("state", worker.name), now + span)
        if worker.state is State.READY:
            worker.ready_at = worker.ready_at or now
            worker.progress = 1.0
            self.note_idle(worker, now)
        if worker.state not in (State.READY, State.DRAINING):
            self._timers.cancel(("silence", worker.name))
            self._timers.cancel(("idle", worker.name))

    def _act(self, worker: Worker, action: Action, now: float) -> None:
        out, name, life = self._out, worker.name, worker.incarnation
        if action is Action.SPAWN:
            grant = self.ledger.grant_of(name)
            assert grant is not None, "a worker is started only with a reservation"
            out.append(do.Spawn(name, life, worker.spec, worker.limits, grant))
        elif action is Action.TERM:
            out.append(do.Signal(name, life, SIGTERM, stops=True))
        elif action is Action.KILL:
            worker.killed = True
            out.append(do.KillGroup(name, life))
            retry = self.params.unkillable_retry if worker.state is State.UNKILLABLE else self.params.kill_timeout
            self._timers.set(("state", name), now + retry)
        elif action in (Action.FREEZE, Action.THAW):
            out.append(do.Freeze(name, life, action is Action.FREEZE))
            worker.heard_at = now
        elif action in (Action.TELL_DRAIN, Action.TELL_SLEEP, Action.TELL_WAKE):
            kind = {Action.TELL_DRAIN: f.Kind.DRAIN, Action.TELL_SLEEP: f.Kind.SLEEP}.get(action, f.Kind.WAKE)
            if worker.spec.engine.hosted:
                out.append(do.ToWorker(worker.peer, kind, b"", f.Empty()))
            if action is Action.TELL_DRAIN:
                self.note_drained(worker, now)
        elif action is Action.LOSE_REQUESTS:
            self.on_lost(worker, now)
        elif action is Action.RELEASE:
            self.ledger.release(name)
        elif action is Action.SCHEDULE_RESTART:
            self._timers.set(("state", name), worker.restart_at)
        else:
            self.on_change(self.models[worker.model], now)

    # -- starting and ending --------------------------------------------------------------------------------

    def start(self, worker: Worker, now: float) -> str:
        """Reserve and spawn. Returns "", or the reason why not now; then nothing has changed."""
        model = self.models[worker.model]
        want = model.spec.resources
        grant = self.ledger.reserve(worker.name, want)
        if isinstance(grant, str):
            for victim in victims(self.ledger, self._evictable(), want):
                self.end(victim, now, f"makes room for {worker.name}")
            worker.why = f"waits for resources: {grant}"
            return grant
        if worker.spec is not model.spec:
            worker.spec, worker.limits = model.spec, model.spec.limits
            worker.slots = worker.limits.slots
        worker.incarnation = max(worker.incarnation, self.params.epoch) + 1
        worker.pid = worker.engine_pid = 0
        worker.peer = worker.token = b""
        worker.stop_wanted = worker.start_after = worker.timed_out = worker.killed = worker.permanent = False
        worker.rested = worker.probed = False
        worker.failure_reason = ""
        worker.progress = -1.0
        worker.started_at, worker.ready_at = now, 0.0
        if worker.exit_status is not None:
            worker.restarts += 1
        worker.starts.append(now)
        self.fire(worker, Trigger.START, now, "on its way")
        return ""

    def end(self, worker: Worker, now: float, why: str, *, at_once: bool = False, again: bool = False) -> None:
        """Somebody wants this life over; `again`: and another begun."""
        worker.stop_wanted, worker.start_after = True, again
        self.fire(worker, Trigger.STOP if at_once else Trigger.DRAIN, now, why)
        if again and worker.state not in ALIVE:
            self.start(worker, now)

    def _evictable(self) -> list[Worker]:
        return [
            worker
            for worker in self.workers.values()
            if worker.state is State.READY and not worker.requests and not self.models[worker.model].queue
            and self._kept(self.models[worker.model]) > self.models[worker.model].spec.scale.min
            and worker.spec.kind == "model"
        ]  # fmt: skip

    def _kept(self, model: Model) -> int:
        """Workers that are up, or coming."""
        return sum(
            worker.state is State.BACKOFF or (worker.state in ALIVE and worker.state not in _ENDING)
            for worker in model.workers.values()
        )

    def balance(self, model: Model, outstanding: int, now: float) -> str:
        """Have as many workers as are needed. Returns why requests that wait now would wait for ever, or "".

        The number is what the outstanding requests fill, within [scale.min, scale.max].
        """
        name = model.spec.model
        if not self.devices_counted:
            return ""  # the daemon starts: who lives is not known yet
        if self.shutting_down or model.removed:
            return "llmosd is shutting down" if self.shutting_down else f"model {name} was removed"
        if model.held:
            return f"model {name} was stopped by an operator; `llmos start {name}` starts it"
        scale = model.spec.scale
        desired = min(scale.max, math.ceil(outstanding / max(1, model.spec.limits.slots)))
        desired = max(scale.min, desired)
        refusal = ""
        for _ in range(desired - self._kept(model)):
            worker = self._startable(model, demanded=outstanding > 0)
            if worker is None:
                break
            refusal = self.start(worker, now)
            if refusal:
                break
        model.why = refusal
        if self._hopeful(model):
            return ""
        if refusal:
            never = self.ledger.could_ever_fit(model.spec.resources)
            return f"{name} cannot be started on this machine: {never}" if never else ""
        broken = [worker for worker in model.workers.values() if worker.state in (State.FAILED, State.UNKILLABLE)]
        if broken:
            return f"worker {broken[0].name} has failed: {broken[0].why}; `llmos reset {name}` clears it"
        return f"every worker of {name} was stopped by an operator; `llmos start {name}` starts it"

    def _hopeful(self, model: Model) -> bool:
        up = COMING | {State.READY, State.FROZEN, State.ASLEEP, State.DRAINING, State.STOPPING}
        return any(
            worker.state in up and not (worker.held and worker.state in _ENDING) for worker in model.workers.values()
        )

    def _startable(self, model: Model, demanded: bool) -> Worker | None:
        for worker in model.workers.values():
            if worker.state is State.STOPPED and not worker.held and (demanded or not worker.rested):
                return worker
        if len(model.workers) >= max(model.spec.scale.max, model.spec.scale.min):
            return None
        return self.add(model)

    def add(self, model: Model, name: str = "") -> Worker:
        """A new worker of a model, not started."""
        if not name:
            numbers = range(1, len(model.workers) + 2)
            name = next(n for n in (f"{model.spec.model}.{k}" for k in numbers) if n not in model.workers)
        worker = model.workers[name] = self.workers[name] = Worker(name, model.spec.model, model.spec)
        return worker

    def _verdict(self, worker: Worker, now: float) -> None:
        """Nothing of this life is left: what next?"""
        self.by_peer.pop(worker.peer, None)
        worker.pid = worker.engine_pid = 0
        again, restart, status = worker.start_after, worker.spec.restart, worker.exit_status
        cause = worker.failure_reason or (str(status) if status else "never ran")
        if worker.stop_wanted:
            self.fire(worker, Trigger.ENDED, now, worker.why)
            worker.failures = 0
        elif worker.permanent:
            self.fire(worker, Trigger.GAVE_UP, now, cause)
        elif not wants_restart(restart.policy, status, worker.timed_out):
            worker.rested = True
            clean = status is not None and status.clean and not worker.timed_out
            self.fire(worker, Trigger.ENDED if clean else Trigger.GAVE_UP, now, cause)
        else:
            if worker.ready_at and now - worker.ready_at >= restart.reset_after:
                worker.failures = 0
            worker.failures += 1
            worker.starts = [at for at in worker.starts if at > now - restart.interval]
            if restart.burst and len(worker.starts) >= restart.burst:
                why = f"{len(worker.starts)} starts within {restart.interval}: {cause}"
                self.fire(worker, Trigger.GAVE_UP, now, why)
            else:
                jitter = spread(self.params.seed, worker.name, worker.restarts + worker.failures)
                worker.restart_at = now + backoff_s(restart, worker.failures, jitter)
                self.fire(worker, Trigger.RETRY, now, cause)
        if again and not self.shutting_down:
            self.start(worker, now)
        self._after_release(now)

    def _after_release(self, now: float) -> None:
        """Resources came back: those who wait for them may start now."""
        for model in list(self.models.values()):
            if model.removed and not any(worker.state in ALIVE for worker in model.workers.values()):
                self.on_change(model, now)
                self.forget(model)
            else:
                self.on_change(model, now)
        if self.shutting_down:
            self.note_all_down()

    def note_all_down(self) -> None:
        if not any(worker.state in ALIVE for worker in self.workers.values()):
            self._out.append(do.AllDown())

    def forget(self, model: Model) -> None:
        """A removed model whose workers are all down."""
        for worker in model.workers.values():
            self._timers.cancel(("state", worker.name))
            del self.workers[worker.name]
        for name in (model.spec.model, *model.spec.aliases):
            if self.names.get(name) == model.spec.model:
                del self.names[name]
        del self.models[model.spec.model]

    # -- what the node says ---------------------------------------------------------------------------------

    def _current(self, name: str, incarnation: int) -> Worker | None:
        worker = self.workers.get(name)
        return worker if worker is not None and worker.incarnation == incarnation else None

    def spawned(self, event: on.Spawned, now: float) -> None:
        worker = self._current(event.worker, event.incarnation)
        if worker is None:
            return
        worker.pid, worker.peer, worker.token = event.pid, event.peer, event.token
        worker.heard_at = now
        self.by_peer[event.peer] = worker
        if not worker.spec.engine.hosted:
            self.fire(worker, Trigger.LOADED, now, "")

    def spawn_failed(self, event: on.SpawnFailed, now: float) -> None:
        worker = self._current(event.worker, event.incarnation)
        if worker is None or worker.state not in ALIVE:
            return
        worker.failure_reason = f"{event.step}: {event.reason}"
        worker.permanent = event.permanent
        worker.exit_status = None
        self._verdict(worker, now)

    def exited(self, event: on.Exited, now: float) -> None:
        worker = self._current(event.worker, event.incarnation)
        if worker is None or worker.state not in ALIVE:
            return
        worker.exit_status = event.status
        worker.failure_reason = worker.failure_reason or event.detail
        cause = worker.failure_reason or str(event.status)
        self._out.append(do.Happened("exited", worker.name, cause, worker.model))
        self.fire(worker, Trigger.EXITED, now, worker.why if worker.stop_wanted else cause)

    def emptied(self, event: on.Emptied, now: float) -> None:
        worker = self._current(event.worker, event.incarnation)
        if worker is None or worker.state not in ALIVE:
            return
        if worker.exit_status is None and worker.state is not State.STOPPING:
            worker.exit_status = ExitStatus()
        self.on_lost(worker, now)
        self._verdict(worker, now)

    def adopted(self, event: on.Adopted, now: float) -> None:
        model = self.models.get(event.spec.model)
        if model is None:
            # Its file is gone: it is known until it is down.
            model = self.models[event.spec.model] = Model(event.spec)
            model.removed = True
        worker = model.workers.get(event.worker) or self.add(model, event.worker)
        worker.spec, worker.limits, worker.slots = event.spec, event.limits, event.limits.slots
        worker.incarnation, worker.pid = event.incarnation, event.pid
        worker.peer, worker.token = event.peer, event.token
        worker.started_at = worker.heard_at = now - max(0.0, now - event.started_at)
        worker.heard_at = now
        self.by_peer[event.peer] = worker
        self.ledger.restore(worker.name, event.grant)
        self.fire(worker, Trigger.ADOPT, now, "alive from before the daemon started")
        if not worker.spec.engine.hosted:
            self.fire(worker, Trigger.LOADED, now, "")
        if event.stopping or model.removed:
            self.end(worker, now, "was being stopped" if event.stopping else "its model file is gone", at_once=True)
        elif worker.spec != model.spec:
            self.end(worker, now, "its model file has changed", again=True)

    def over_limit(self, event: on.OverLimit, now: float) -> None:
        worker = self._current(event.worker, event.incarnation)
        if worker is None or worker.state not in ALIVE or worker.state in _ENDING:
            return
        worker.failure_reason, worker.timed_out = event.reason, True
        if not self.fire(worker, Trigger.HUNG, now, event.reason):
            self.fire(worker, Trigger.STOP, now, event.reason)

    def counted(self, event: on.Counted, now: float) -> None:
        self.ledger.capacity = event.capacity
        self.devices_counted = True
        for model in list(self.models.values()):
            self.on_change(model, now)

    # -- what the host says ---------------------------------------------------------------------------------

    def phase(self, worker: Worker, phase: str, progress: float, detail: str, now: float) -> None:
        """The host told how its engine is."""
        worker.heard_at, worker.probed = now, False
        if phase == f.Phase.FAILED:
            worker.failure_reason = detail
        elif phase == f.Phase.READY and worker.state in (
            State.STARTING, State.LOADING, State.ADOPTED, State.WAKING,
        ):  # fmt: skip
            self.fire(worker, Trigger.LOADED, now, "")
        elif phase == f.Phase.LOADING and worker.state in (State.STARTING, State.ADOPTED):
            self.fire(worker, Trigger.HELLO, now, detail or "the engine loads")
        elif phase == f.Phase.LOADING and worker.state is State.LOADING and progress > worker.progress:
            worker.progress = progress
            self._timers.set(("state", worker.name), now + worker.spec.timeouts.load)
        if phase == f.Phase.LOADING and detail:
            worker.why = detail

    # -- what the requests say ------------------------------------------------------------------------------

    def note_busy(self, worker: Worker, now: float) -> None:
        """The worker was given a request."""
        worker.dispatched_at = now
        self._timers.cancel(("idle", worker.name))
        if worker.running == 1:
            worker.heard_at = max(worker.heard_at, now)
            self._timers.set(("silence", worker.name), now + worker.spec.timeouts.silence / 2)

    def note_idle(self, worker: Worker, now: float) -> None:
        """A request left the worker, or it just became ready."""
        if worker.running == 0:
            self._timers.cancel(("silence", worker.name))
        if worker.requests:
            return
        worker.idle_since = now
        if worker.state is State.READY and worker.spec.kind == "model" and worker.spec.scale.idle_timeout:
            self._timers.set(("idle", worker.name), now + worker.spec.scale.idle_timeout)
        self.note_drained(worker, now)

    def note_drained(self, worker: Worker, now: float) -> None:
        if worker.state is State.DRAINING and not worker.requests:
            self.fire(worker, Trigger.DRAINED, now, worker.why)

    # -- time -----------------------------------------------------------------------------------------------

    def due(self, what: str, name: str, now: float) -> None:
        """A timer of a worker ran out."""
        worker = self.workers.get(name)
        if worker is None:
            return
        if what == "state":
            self._state_due(worker, now)
        elif what == "idle":
            model = self.models[worker.model]
            if not worker.requests and self._kept(model) > model.spec.scale.min:
                self.end(worker, now, f"idle for {worker.spec.scale.idle_timeout}")
        else:
            self._silence_due(worker, now)

    def _state_due(self, worker: Worker, now: float) -> None:
        if worker.state is State.BACKOFF:
            if self.start(worker, now):
                self._timers.set(("state", worker.name), now + worker.spec.restart.delay_max)
        elif worker.state is State.STOPPING and worker.killed:
            self.fire(worker, Trigger.HUNG, now, "killed and still there: a process is stuck in the kernel")
        elif worker.state in (State.STARTING, State.LOADING, State.ADOPTED, State.WAKING):
            times, state = worker.spec.timeouts, worker.state
            span = times.load if state in (State.LOADING, State.WAKING) else times.start
            worker.timed_out = True
            worker.failure_reason = f"no progress in {span} while {state}"
            self.fire(worker, Trigger.TIMEOUT, now, worker.failure_reason)
        else:
            self.fire(worker, Trigger.TIMEOUT, now, worker.why)

    def _silence_due(self, worker: Worker, now: float) -> None:
        if worker.running == 0:
            return
        silence = worker.spec.timeouts.silence
        if now >= worker.heard_at + silence:
            worker.timed_out = True
            worker.failure_reason = f"hung: no sign of life in {silence} while {worker.running} request(s) run"
            self.fire(worker, Trigger.HUNG, now, worker.failure_reason)
            return
        if now >= worker.heard_at + silence / 2 and not worker.probed:
            worker.probed = True
            self._out.append(do.ToWorker(worker.peer, f.Kind.HELLO, b"", f.Empty()))
        step_s = silence if worker.probed else silence / 2
        self._timers.set(("silence", worker.name), max(worker.heard_at + step_s, now + 0.001))

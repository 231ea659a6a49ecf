"""What the node, the hosts and the clock say of workers, turned into triggers of `lifecycle`. For the kernel.

Each worker's life ends here, with a verdict on whether another follows.
"""

from __future__ import annotations

from typing import Final

import msgspec

from llmos.protocol import frames as f
from llmosd.kernel import effects as do
from llmosd.kernel import events as on
from llmosd.kernel.demand import Demand, spare
from llmosd.kernel.dependencies import worn_out_until
from llmosd.kernel.fleet import PROBE_S, SIGTERM, SPAWN_S, Fleet, same_process
from llmosd.kernel.lifecycle import ALIVE, State, Trigger
from llmosd.kernel.restart import ExitStatus
from llmosd.kernel.spec import EXIT_CANNOT_WORK
from llmosd.kernel.timers import Timers
from llmosd.kernel.verdict import judge
from llmosd.kernel.worker import Model, Worker

_COMING_UP: Final = frozenset({State.STARTING, State.LOADING, State.ADOPTED, State.WAKING})
#: Seconds that a restart waits at a time while the devices are not yet counted.
NOT_COUNTED_S: Final = 0.05
_ENDING: Final = frozenset({State.STOPPING, State.DRAINING, State.UNKILLABLE})


class Supervisor:
    """Watches over the workers of a fleet."""

    def __init__(self, fleet: Fleet, demand: Demand, out: list[do.Effect], timers: Timers) -> None:
        self._fleet = fleet
        self._demand = demand
        self._out = out
        self._timers = timers

    # -- what the node says ---------------------------------------------------------------------------------

    def _alive(self, name: str, incarnation: int) -> Worker | None:
        """The worker, if this life of it has not ended."""
        worker = self._fleet.workers.get(name)
        return worker if worker and worker.incarnation == incarnation and worker.state in ALIVE else None

    def spawned(self, event: on.Spawned, now: float) -> None:
        worker = self._alive(event.worker, event.incarnation)
        if worker is None or worker.peer:
            return
        worker.pid, worker.peer, worker.token = event.pid, event.peer, event.token
        worker.heard_at = now
        self._fleet.by_peer[event.peer] = worker
        # What has changed since its order was given.
        self._fleet.pinning.confine(worker)
        self._fleet.settle_cpus()
        if worker.killed:
            # Ended before it began: what was sent then found no process.
            self._out.append(do.KillGroup(worker.name, worker.incarnation))
            self._timers.set(("state", worker.name), now + self._fleet.params.kill_timeout)
        elif worker.state is State.STOPPING:
            self._out.append(do.Signal(worker.name, worker.incarnation, SIGTERM, stops=True))
            self._timers.set(("state", worker.name), now + worker.spec.timeouts.stop)
        elif not worker.spec.engine.hosted:
            self._runs(worker, not worker.spec.says_ready, now)
        elif worker.state is State.STARTING:
            self._timers.set(("state", worker.name), now + worker.spec.timeouts.start)

    def _runs(self, worker: Worker, ready: bool, now: float) -> None:
        """A command's process runs."""
        if ready:
            self._fleet.fire(worker, Trigger.LOADED, now)
        else:
            self._fleet.fire(worker, Trigger.HELLO, now, "is not ready yet")

    def spawn_failed(self, event: on.SpawnFailed, now: float) -> None:
        worker = self._alive(event.worker, event.incarnation)
        if worker is None or worker.peer:
            return
        worker.failure_reason = f"{event.step}: {event.reason}"
        worker.permanent = event.permanent
        self._conclude(worker, now)

    def exited(self, event: on.Exited, now: float) -> None:
        worker = self._alive(event.worker, event.incarnation)
        if worker is None:
            return
        worker.exit_status = event.status
        status, detail = str(event.status), event.detail
        worker.last_exit = detail if detail.startswith(status) else ": ".join(filter(None, (status, detail)))
        worker.permanent = worker.spec.engine.hosted and event.status.code == EXIT_CANNOT_WORK
        worker.failure_reason = worker.failure_reason or event.detail
        cause = worker.failure_reason or str(event.status)
        self._out.append(do.Happened("exited", worker.name, cause, worker.model))
        self._fleet.fire(worker, Trigger.EXITED, now, worker.why if worker.stop_wanted and not worker.ending else cause)

    def emptied(self, event: on.Emptied, now: float) -> None:
        worker = self._alive(event.worker, event.incarnation)
        if worker is None:
            return
        if worker.exit_status is None:
            self.exited(on.Exited(event.worker, event.incarnation, ExitStatus()), now)
        self._conclude(worker, now)

    def adopted(self, event: on.Adopted, now: float) -> None:
        fleet, spec = self._fleet, event.spec
        worker = fleet.workers.get(event.worker)
        if worker is not None and (worker.model != spec.model or worker.state is not State.STOPPED):
            if worker.incarnation != event.incarnation:  # one name, two processes: the one on record first stays
                self._out.append(do.KillGroup(event.worker, event.incarnation))
            return
        model = fleet.models.get(spec.model)
        if model is None:
            model = fleet.models[spec.model] = Model(spec)
            model.removed = True  # its file is gone: it is known until it is down
            fleet.dependencies.note(spec.model, (), spec.requires)
        worker = worker or fleet.add(model, event.worker)
        worker.begin_life(spec, event.incarnation, min(now, event.started_at))
        worker.in_force, worker.on_record, worker.slots = event.limits, event.grant, event.limits.slots
        worker.limits = msgspec.structs.replace(event.limits, allowed_cpus=event.grant.allowed_cpus)
        worker.pid, worker.peer, worker.token = event.pid, event.peer, event.token
        worker.heard_at = now
        worker.unheard = spec.engine.hosted
        fleet.by_peer[event.peer] = worker
        fleet.ledger.restore(worker.name, event.grant)
        fleet.fire(worker, Trigger.ADOPT, now, "alive from before the daemon started")
        if event.stopping:
            fleet.end(worker, now, "was being stopped", at_once=True)
        elif event.draining:
            fleet.end(worker, now, "was draining when the daemon started")
        elif model.removed or fleet.shutting_down:
            why = "its model file is gone" if model.removed else "llmosd is shutting down"
            fleet.end_in_order([worker], now, why)
        elif worker.held:
            fleet.end_in_order([worker], now, "stopped by an operator")
        elif not same_process(spec, model.spec):
            fleet.end_in_order([worker], now, "its model file has changed", again=True)
        else:
            worker.spec = model.spec
            if event.ended is None and spec.limits != model.spec.limits:
                fleet.confine(worker, model.spec.limits)
            if event.ended is None and not spec.engine.hosted:
                self._runs(worker, event.ready or not spec.says_ready, now)
        if event.ended is not None:
            if event.ready:
                worker.ready_at = worker.started_at
            self.exited(on.Exited(worker.name, worker.incarnation, event.ended, event.detail), now)
        if event.frozen and not fleet.fire(worker, Trigger.FREEZE, now, "frozen before the daemon started"):
            self._out.append(do.Freeze(worker.name, worker.incarnation, False))  # or it could not end
        fleet.settle_cpus()
        fleet.touch(model)

    def over_limit(self, event: on.OverLimit, now: float) -> None:
        worker = self._alive(event.worker, event.incarnation)
        if worker is None or worker.state in _ENDING:
            return
        worker.failure_reason, worker.faulted = event.reason, True
        if not self._fleet.fire(worker, Trigger.HUNG, now, event.reason):
            self._fleet.fire(worker, Trigger.STOP, now, event.reason)

    def strained(self, event: on.Strained, now: float) -> None:
        worker = self._alive(event.worker, event.incarnation)
        if worker is not None and worker.strain != event.why:
            worker.strain = event.why
            self._out.append(do.Happened("strained" if event.why else "relieved", worker.name, event.why, worker.model))

    def ready(self, event: on.Ready, now: float) -> None:
        if (worker := self._probed(event.worker, event.incarnation)) is not None and worker.state is State.LOADING:
            self._fleet.fire(worker, Trigger.LOADED, now)

    def not_ready(self, event: on.NotReady, now: float) -> None:
        worker = self._probed(event.worker, event.incarnation)
        if worker is None or worker.state is not State.LOADING:
            return
        worker.why = event.reason or worker.why
        if event.progressed:
            self._timers.set(("state", worker.name), now + worker.spec.timeouts.load)

    def unhealthy(self, event: on.Unhealthy, now: float) -> None:
        worker = self._probed(event.worker, event.incarnation)
        if worker is None or worker.state not in (State.READY, State.LOADING):
            return  # it was frozen meanwhile, or ends already
        worker.failure_reason, worker.faulted = event.reason, True
        trigger = Trigger.HUNG if worker.state is State.READY else Trigger.TIMEOUT
        self._fleet.fire(worker, trigger, now, event.reason)

    def _probed(self, name: str, incarnation: int) -> Worker | None:
        """The worker, if it is a command: of the others their hosts tell how they are."""
        worker = self._alive(name, incarnation)
        return worker if worker is not None and not worker.spec.engine.hosted else None

    def counted(self, event: on.Counted, now: float) -> None:
        self._fleet.ledger.capacity = event.capacity
        self._fleet.counted = True
        self._fleet.pinning.settle(counted=True)
        for model in self._fleet.models.values():
            self._fleet.touch(model)

    def _conclude(self, worker: Worker, now: float) -> None:
        """Nothing of this life is left: what next?"""
        fleet = self._fleet
        if fleet.by_peer.get(worker.peer) is worker:
            del fleet.by_peer[worker.peer]
        worker.pid = worker.engine_pid = 0
        worker.ending = None
        self._timers.cancel(("order", worker.name))
        again, worker.start_after = worker.start_after, False
        verdict = judge(worker, now, fleet.params.seed)
        worker.failures, worker.rested, worker.restart_at = verdict.failures, verdict.rested, verdict.restart_at
        fleet.fire(worker, verdict.trigger, now, verdict.why)
        if again and not fleet.models[worker.model].removed:
            self._demand.start(worker, now)
        if (until := worn_out_until(worker)) > now:
            self._timers.set(("worn", worker.name), until)
        fleet.touch(fleet.models[worker.model])
        fleet.touch_short()
        fleet.note_all_down()

    # -- what the host says ---------------------------------------------------------------------------------

    def hello(self, worker: Worker, header: f.WorkerHello, now: float) -> None:
        """The host spoke, and was understood."""
        if not (header.phase == f.Phase.READY and worker.state in _COMING_UP):
            self._fleet.fire(worker, Trigger.HELLO, now)
        self.phase(worker, header.phase, -1.0, "", now)

    def phase(self, worker: Worker, phase: str, progress: float, detail: str, now: float) -> None:
        """The host told how its engine is."""
        fleet = self._fleet
        if phase == f.Phase.FAILED:
            if worker.state not in _ENDING:
                worker.failure_reason, worker.faulted = detail or "the engine failed", True
                fleet.fire(worker, Trigger.DRAIN, now, worker.failure_reason)
        elif phase == f.Phase.READY and worker.state in _COMING_UP:
            fleet.fire(worker, Trigger.LOADED, now)
        elif phase == f.Phase.DRAINING and worker.state in _COMING_UP:
            # Told so by an earlier daemon, whose decision stands.
            fleet.fire(worker, Trigger.LOADED, now)
            fleet.end(worker, now, "was draining when the daemon started")
        elif phase == f.Phase.LOADING and worker.state in (State.STARTING, State.ADOPTED):
            fleet.fire(worker, Trigger.HELLO, now, detail or "the engine loads")
        elif phase == f.Phase.LOADING and worker.state is State.LOADING:
            worker.why = detail or worker.why
            if progress > worker.progress:
                worker.progress = min(progress, 1.0)
                self._timers.set(("state", worker.name), now + worker.spec.timeouts.load)

    # -- time -----------------------------------------------------------------------------------------------

    def due(self, what: str, name: str, now: float) -> None:
        """A timer of a worker ran out."""
        worker = self._fleet.workers.get(name)
        if worker is None:
            return
        if what == "state":
            self._state_due(worker, now)
        elif what == "idle":
            self._idle_due(worker, now)
        elif what == "worn":
            self._fleet.touch_around(self._fleet.models[worker.model])
        elif what == "order":
            if worker.ending:  # whoever requires it had its time
                why, at_once = worker.ending
                self._fleet.end(worker, now, why, at_once=at_once, again=worker.start_after)
        else:
            self._silence_due(worker, now)

    def _state_due(self, worker: Worker, now: float) -> None:
        fleet = self._fleet
        if worker.state is State.BACKOFF and not fleet.counted:
            self._timers.set(("state", worker.name), now + NOT_COUNTED_S)
        elif worker.state is State.BACKOFF:
            if self._demand.start(worker, now) and worker.state is State.BACKOFF:
                # The delay is over; from here on it waits for resources as any stopped worker does.
                fleet.fire(worker, Trigger.STOP, now, worker.why)
                fleet.touch(fleet.models[worker.model])
        elif worker.state is State.STOPPING and worker.killed:
            stuck = "killed and still there: a process is stuck in the kernel"
            fleet.fire(worker, Trigger.HUNG, now, stuck if worker.peer else "it was never spawned, nor refused")
        elif worker.state in _COMING_UP:
            times, state = worker.spec.timeouts, worker.state
            span = times.load if state in (State.LOADING, State.WAKING) else times.start
            worker.faulted = True
            worker.failure_reason = f"no progress in {span} while {state}"
            if not worker.peer:
                worker.failure_reason = f"was not spawned within {SPAWN_S:g} s"
            if not worker.spec.engine.hosted and worker.why:
                worker.failure_reason += f": {worker.why}"
            fleet.fire(worker, Trigger.TIMEOUT, now, worker.failure_reason)
        else:
            fleet.fire(worker, Trigger.TIMEOUT, now, worker.why)

    def _idle_due(self, worker: Worker, now: float) -> None:
        model = self._fleet.models[worker.model]
        timeout = model.spec.scale.idle_timeout
        if worker.state is not State.READY or worker.requests or not timeout:
            return  # set again when it turns idle
        due = worker.idle_since + timeout
        if now >= due and spare(model, self._fleet.dependencies.needed(model)):
            self._fleet.end(worker, now, f"idle for {timeout}")
        else:
            self._timers.set(("idle", worker.name), due if due > now else now + timeout)

    def _silence_due(self, worker: Worker, now: float) -> None:
        """Ask a silent worker for a sign of life; one that works and stays silent is hung."""
        at_work = worker.state in (State.READY, State.DRAINING) and worker.running > 0
        if not worker.spec.engine.hosted or (not at_work and worker.state not in (State.LOADING, State.WAKING)):
            return  # set again when there is something to hear
        silence = worker.spec.timeouts.silence
        if at_work and silence and now >= worker.heard_at + silence:
            worker.faulted = True
            worker.failure_reason = f"hung: no sign of life in {silence} while {worker.running} request(s) run"
            self._fleet.fire(worker, Trigger.HUNG, now, worker.failure_reason)
            return
        probe_s = max(0.05, min(PROBE_S, silence / 4)) if silence else PROBE_S
        if now >= worker.heard_at + probe_s:
            self._out.append(do.ToWorker(worker.peer, f.Kind.HELLO, b"", f.Empty()))
        self._timers.set(("silence", worker.name), now + probe_s)

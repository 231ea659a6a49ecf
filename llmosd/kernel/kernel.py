"""The kernel: wires its parts, and holds no policy.

`handle(event, now)` returns the effects of one event, `deadline()` the moment it wants a Tick. That is its whole
interface to the world; the rest of the methods are reads. Single writer, no locks, no await, no clock.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from llmos.protocol import frames as f
from llmosd.kernel import effects as do
from llmosd.kernel import events as on
from llmosd.kernel import views
from llmosd.kernel.demand import Demand
from llmosd.kernel.fleet import Fleet
from llmosd.kernel.holds import Holds
from llmosd.kernel.lifecycle import COMING, State
from llmosd.kernel.operators import CommandError, Operators
from llmosd.kernel.params import Params
from llmosd.kernel.recovery import Recovery
from llmosd.kernel.requests import Request, RequestState
from llmosd.kernel.routing import Routing
from llmosd.kernel.supervisor import Supervisor
from llmosd.kernel.table import Table
from llmosd.kernel.timers import Timers
from llmosd.kernel.worker import Worker

#: Commands that hold, or let go of what is held.
_HOLDING: Final = (on.Start, on.Stop, on.Restarted, on.Remove)


class Kernel:
    """One node's workers, requests and resources, as a function of events and time."""

    def __init__(self, params: Params) -> None:
        self.params = params
        self._out: list[do.Effect] = []
        self._timers = Timers()
        out, timers = self._out, self._timers
        self.fleet = fleet = Fleet(params, out, timers)
        self.table = Table(params, fleet, out, timers)
        demand = Demand(fleet)
        self._recovery = Recovery(params, fleet, self.table, out)
        self.routing = routing = Routing(params, fleet, demand, self.table, self._recovery, out, timers)
        self._supervisor = supervisor = Supervisor(fleet, demand, out, timers)
        self._holds = holds = Holds(fleet)
        self.operators = Operators(fleet, demand, self.table, routing, holds, out)
        fleet.on_lost = self._recovery.lose
        self._handlers: dict[type[on.Event], Callable[[Any, float], object]] = {
            on.Tick: lambda event, now: None,
            on.ClientSaid: self._client_said,
            on.ClientIdentified: self._client_identified,
            on.ClientLost: lambda event, now: routing.client_lost(event.peer, event.why, now),
            on.ClientUnreachable: lambda event, now: routing.client_unreachable(event.peer, now),
            on.WorkerSaid: self._worker_said,
            on.Spawned: supervisor.spawned,
            on.SpawnFailed: supervisor.spawn_failed,
            on.Adopted: supervisor.adopted,
            on.Exited: supervisor.exited,
            on.Emptied: supervisor.emptied,
            on.OverLimit: supervisor.over_limit,
            on.Strained: supervisor.strained,
            on.Ready: supervisor.ready,
            on.NotReady: supervisor.not_ready,
            on.Unhealthy: supervisor.unhealthy,
            on.Counted: supervisor.counted,
            on.ShutDown: self.operators.shut_down,
            on.Held: lambda event, now: holds.recall(event),
            **{kind: self._commanded(command) for kind, command in self._commands().items()},
        }

    def handle(self, event: on.Event, now: float) -> list[do.Effect]:
        """What is to be done about `event`, and about every deadline that passed by `now`."""
        self._handlers[type(event)](event, now)
        changed, timers = self.fleet.changed, self._timers
        while True:
            if changed:
                self.routing.settle(now)
            elif (key := timers.pop_due(now)) is not None:
                self._due(key, now)
            else:
                break
        effects = self._out[:]
        self._out.clear()
        return effects

    def deadline(self) -> float | None:
        """When to call `handle` with a Tick at the latest, or None."""
        return self._timers.earliest()

    # -- messages -------------------------------------------------------------------------------------------

    def _client_said(self, event: on.ClientSaid, now: float) -> None:
        kind, rid, header, payload, _ = event.message
        routing, peer = self.routing, event.peer
        if kind is f.Kind.ACK:
            assert isinstance(header, f.Ack)
            routing.ack(rid, header.seq, now)
        elif kind is f.Kind.SUBMIT:
            assert isinstance(header, f.Submit)
            routing.submit(peer, rid, header, payload, now)
        elif kind is f.Kind.CANCEL:
            assert isinstance(header, f.Cancel)
            if (request := self.table.requests.get(rid)) is not None and request.peer == peer:
                routing.cancel(rid, "", now)
        elif isinstance(header, f.ClientHello):
            routing.hello(peer, header, now)

    def _client_identified(self, event: on.ClientIdentified, now: float) -> None:
        self.routing.owners[event.peer] = event.uid
        self._out.append(do.WatchClient(event.peer, event.pid))

    def _worker_said(self, event: on.WorkerSaid, now: float) -> None:
        message, peer = event.message, event.peer
        worker = self.fleet.by_peer.get(peer)
        header = message.header
        if worker is None or (isinstance(header, f.WorkerHello) and header.token != worker.token):
            self.table.counts["unknown_worker"] += 1
            return
        worker.heard_at = now
        if isinstance(header, f.WorkerHello):
            p = self.params
            welcome = f.Welcome(p.epoch, p.body_max, p.window, p.answer_max)
            self._out.append(do.ToWorker(peer, f.Kind.WELCOME, b"", welcome))
            self._recovery.reconcile(worker, header, now)
            self._supervisor.hello(worker, header, now)
        elif isinstance(header, f.Status):
            worker.engine_pid = header.engine_pid or worker.engine_pid
            self._supervisor.phase(worker, header.phase, header.progress, header.detail, now)
        else:
            self.routing.worker_said(worker, message, now)

    # -- commands -------------------------------------------------------------------------------------------

    def _commands(self) -> dict[type[Any], Callable[[Any, float], list[Worker]]]:
        o = self.operators
        return {
            on.Apply: o.apply,
            on.Remove: o.remove,
            on.Start: o.start,
            on.Stop: o.stop,
            on.Restarted: o.restart,
            on.Reset: o.reset,
            on.Kill: o.kill,
            on.SetLimits: o.set_limits,
        }

    def _commanded(self, command: Callable[[Any, float], list[Worker]]) -> Callable[[Any, float], None]:
        def run(event: Any, now: float) -> None:
            try:
                workers = command(event, now)
                # Who waits is no refusal: it is taken on.
                message = "; ".join(f"{w.name} {w.why}" for w in workers if w.state is State.WAITING)
                reply = do.Replied(event.call, message=message, workers=tuple(worker.name for worker in workers))
            except CommandError as refusal:
                reply = do.Replied(event.call, refusal.code, str(refusal))
            if isinstance(event, _HOLDING) and (held := self._holds.changed()) is not None:
                # Before what was done about it: whenever the daemon dies, what an operator was told holds.
                self._out.insert(0, held)
            self._out.append(reply)

        return run

    # -- time -----------------------------------------------------------------------------------------------

    def _due(self, key: Any, now: float) -> None:
        if isinstance(key, bytes):
            self.routing.due(key, now)
            return
        what, subject = key
        if what == "away":
            self.routing.away(subject, now)
        else:
            self._supervisor.due(what, subject, now)

    # -- reads ----------------------------------------------------------------------------------------------

    def workers(self) -> list[views.WorkerView]:
        fleet = self.fleet
        return [
            views.of_worker(worker, fleet.models[worker.model], fleet.ledger.grant_of(worker.name))
            for worker in fleet.workers.values()
        ]

    def models(self) -> list[views.ModelView]:
        return [
            views.ModelView(
                spec=model.spec,
                why=model.why,
                queue=len(model.queue),
                running=sum(worker.running for worker in model.workers.values()),
                workers=sum(worker.pid > 0 for worker in model.workers.values()),
                ready=sum(worker.state == "ready" for worker in model.workers.values()),
                held=model.held,
            )
            for model in self.fleet.models.values()
        ]

    def requests(self) -> list[views.RequestView]:
        return [self._request_view(request) for request in self.table.requests.values()]

    def _request_view(self, request: Request) -> views.RequestView:
        state = request.state
        model = self.fleet.models.get(request.model)
        if state is RequestState.READY and model is not None:
            states = {worker.state for worker in model.workers.values()}
            if "ready" not in states and (states & COMING or model.why):
                state = RequestState.BLOCKED
        return views.RequestView(
            rid=request.rid,
            model=request.model,
            worker=request.worker or "",
            tenant=request.tenant,
            state=state,
            priority=request.submit.priority,
            attempt=max(0, request.attempt - self.params.epoch),
            path=request.submit.path,
            stream=request.submit.stream,
            prompt_tokens=request.prompt_tokens,
            tokens=request.tokens,
            accepted_at=request.accepted_at,
            dispatched_at=request.dispatched_at,
            first_item_at=request.first_item_at,
            expires_at=request.expires_at,
            connected=request.peer is not None,
        )

    def ledger(self) -> views.LedgerView:
        return views.LedgerView(self.fleet.ledger.capacity, self.fleet.ledger.free())

    def counters(self) -> dict[str, int]:
        return dict(self.table.counts)

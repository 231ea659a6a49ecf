"""What operators command: apply, remove, start, stop, restart, reset, kill, limits. For the kernel.

Every command is answered at once with `Replied`: done means that the kernel has taken it on; what becomes of it shows
in the workers' states.
"""

from __future__ import annotations

from typing import Final

import msgspec

from llmosd.kernel import effects as do
from llmosd.kernel import events as on
from llmosd.kernel.demand import Demand
from llmosd.kernel.fleet import Fleet, same_process
from llmosd.kernel.holds import Holds
from llmosd.kernel.lifecycle import ALIVE, State, Trigger
from llmosd.kernel.routing import Routing
from llmosd.kernel.spec import Limits, ModelSpec
from llmosd.kernel.table import Table
from llmosd.kernel.units import Quantity, decode_quantity, encode_quantity
from llmosd.kernel.worker import Model, Worker

SIGKILL: Final = 9
SIGCONT: Final = 18
SIGSTOP: Final = 19


class CommandError(Exception):
    """A command that is not carried out. `code`: not_found, refused or invalid."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Operators:
    """Commands over a fleet and its requests. Each method returns the workers it concerns, or raises CommandError."""

    def __init__(
        self, fleet: Fleet, demand: Demand, table: Table, routing: Routing, holds: Holds, out: list[do.Effect]
    ) -> None:
        self._fleet = fleet
        self._demand = demand
        self._table = table
        self._routing = routing
        self._holds = holds
        self._out = out

    def _find(self, name: str) -> tuple[Model, list[Worker], bool]:
        """(model, workers, whether the name is the model's) for a model's, an alias's or a worker's name."""
        fleet = self._fleet
        if (worker := fleet.workers.get(name)) is not None:
            return fleet.models[worker.model], [worker], False
        model = fleet.models.get(fleet.names.get(name, name))
        if model is None:
            known = ", ".join(sorted(fleet.models)) or "none"
            raise CommandError("not_found", f"no model or worker {name!r}; models: {known}")
        return model, list(model.workers.values()), True

    def apply(self, event: on.Apply, now: float) -> list[Worker]:
        fleet, spec = self._fleet, event.spec
        name = spec.model
        for other in (name, *spec.aliases):
            if fleet.names.get(other, name) != name:
                raise CommandError("refused", f"the name {other!r} belongs to model {fleet.names[other]} already")
        if circle := fleet.dependencies.cycle(spec):
            raise CommandError("refused", f"model {name} would wait for itself: {circle}")
        model = fleet.models.get(name)
        if model is None:
            model = fleet.models[name] = Model(spec)
            fleet.dependencies.note(name, (), spec.requires)
            self._out.append(do.Happened("applied", name, "new model", name))
        elif model.spec == spec and not model.removed:
            return []
        else:
            fleet.touch_around(model)  # whom it required until now
            self._change(model, spec, now)
        for alias in [alias for alias, owner in fleet.names.items() if owner == name]:
            del fleet.names[alias]
        fleet.names.update(dict.fromkeys((name, *spec.aliases), name))
        self._holds.settle(model)
        fleet.touch_around(model)
        fleet.touch_short()
        return list(model.workers.values())

    def _change(self, model: Model, spec: ModelSpec, now: float) -> None:
        """Limits and scale change on the run; anything else starts the model's workers again, one life later."""
        old, model.spec, model.removed = model.spec, spec, False
        self._fleet.dependencies.note(spec.model, old.requires, spec.requires)
        self._out.append(do.Happened("applied", spec.model, "changed model", spec.model))
        live = same_process(old, spec)
        for worker in list(model.workers.values()):
            if live:
                worker.spec = spec
                self._fleet.confine(worker, spec.limits)
            elif worker.state in ALIVE and not worker.stop_wanted:
                self._fleet.end_in_order([worker], now, "its model file has changed", again=True)
            elif worker.state not in ALIVE:
                self._reset(worker, now)  # what failed with the old file may work with the new one
        self._demand.trim(model, now)

    def remove(self, event: on.Remove, now: float) -> list[Worker]:
        model, workers, whole = self._find(event.model)
        if not whole:
            raise CommandError("invalid", f"{event.model} is a worker; remove its model, {model.spec.model}")
        model.removed = True
        self._out.append(do.Happened("removed", model.spec.model, "", model.spec.model))
        self._holds.forget(model)
        self._fleet.end_in_order(workers, now, "its model was removed")
        self._fleet.touch_around(model)
        return workers

    def start(self, event: on.Start, now: float) -> list[Worker]:
        model, workers, whole = self._find(event.name)
        if model.removed or self._fleet.shutting_down:
            why = f"model {model.spec.model} was removed" if model.removed else "llmosd is shutting down"
            raise CommandError("refused", f"{event.name} is not started: {why}")
        every = workers
        if whole:
            up = [worker for worker in workers if worker.state in ALIVE]
            down = [worker for worker in workers if worker.state in (State.FAILED, State.BACKOFF, State.WAITING)]
            workers = up + down or workers[:1] or [self._fleet.add(model)]
        lack = self._fleet.dependencies.lack(model)
        if lack is not None and lack.hopeless and not all(worker.state in ALIVE for worker in workers):
            raise CommandError("refused", f"{event.name} is not started: {lack.why}")
        for worker in every:
            worker.held = worker.rested = False
        model.held = model.held and not whole
        self._fleet.touch_around(model)
        for worker in workers:
            if worker.state not in ALIVE:
                worker.failures = 0
                worker.starts.clear()
                refusal = self._demand.start(worker, now)
                worker.asked = worker.state is State.WAITING
                if refusal and not worker.asked:
                    raise CommandError("refused", f"{worker.name} is not started: {refusal}")
            elif worker.stop_wanted:
                worker.start_after = True
        return workers

    def stop(self, event: on.Stop, now: float) -> list[Worker]:
        model, workers, whole = self._find(event.name)
        if whole:
            model.held = True
        for worker in workers:
            worker.held = True
        self._fleet.end_in_order(workers, now, "stopped by an operator", at_once=event.now)
        self._fleet.touch_around(model)
        return workers

    def restart(self, event: on.Restarted, now: float) -> list[Worker]:
        model, workers, _ = self._find(event.name)
        running = [worker for worker in workers if worker.state in ALIVE]
        if not running or model.removed or self._fleet.shutting_down:
            return self.start(on.Start(event.call, event.name), now)
        for worker in running:
            worker.held = model.held = False
        self._fleet.end_in_order(running, now, "restarted by an operator", again=True)
        return running

    def reset(self, event: on.Reset, now: float) -> list[Worker]:
        model, workers, _ = self._find(event.name)
        for worker in workers:
            self._reset(worker, now)
        self._fleet.touch(model)
        return workers

    def _reset(self, worker: Worker, now: float) -> None:
        worker.failures = 0
        worker.starts.clear()
        worker.rested = False
        self._fleet.fire(worker, Trigger.RESET, now)

    def kill(self, event: on.Kill, now: float) -> list[Worker]:
        request = self._request(event.name)
        if request is not None:
            self._routing.cancel(request, "cancelled by an operator", now)
            return []
        _, workers, _ = self._find(event.name)
        alive = [worker for worker in workers if worker.state in ALIVE and worker.pid]
        if not alive:
            raise CommandError("refused", f"no process of {event.name} runs")
        for worker in alive:
            self._signal(worker, event.signal, now)
        return alive

    def _signal(self, worker: Worker, signal: int, now: float) -> None:
        if not 0 < signal <= 64:
            raise CommandError("invalid", f"there is no signal {signal}")
        if signal == SIGKILL:
            self._out.append(do.KillGroup(worker.name, worker.incarnation))
        elif signal in (SIGSTOP, SIGCONT):
            trigger = Trigger.FREEZE if signal == SIGSTOP else Trigger.THAW
            verb = "freeze" if signal == SIGSTOP else "thaw"
            if not self._fleet.fire(worker, trigger, now, "frozen by an operator" if verb == "freeze" else ""):
                raise CommandError("refused", f"cannot {verb} {worker.name} while it is {worker.state}")
        else:
            self._out.append(do.Signal(worker.name, worker.incarnation, signal))

    def _request(self, name: str) -> bytes | None:
        """The id of a request, given whole or by a prefix of at least 6 digits that fits only one."""
        if len(name) < 6 or any(c not in "0123456789abcdef" for c in name):
            return None
        found = [rid for rid in self._table.requests if rid.hex().startswith(name)]
        return found[0] if len(found) == 1 else None

    def set_limits(self, event: on.SetLimits, now: float) -> list[Worker]:
        model, workers, whole = self._find(event.name)
        _changed(model.spec.limits, event.changes)  # refuses as a whole, before anything is changed
        for worker in workers if "allowed_cpus" in event.changes else ():
            if why := self._fleet.ledger.why_not_allow(
                worker.name, _changed(worker.limits, event.changes).allowed_cpus
            ):
                raise CommandError("refused", f"{worker.name} cannot be kept on these CPUs: {why}")
        if whole:
            model.spec = msgspec.structs.replace(model.spec, limits=_changed(model.spec.limits, event.changes))
        for worker in workers:
            worker.spec = msgspec.structs.replace(worker.spec, limits=_changed(worker.spec.limits, event.changes))
            self._fleet.confine(worker, _changed(worker.limits, event.changes))
        self._fleet.touch(model)
        return workers

    def shut_down(self, event: on.ShutDown, now: float) -> None:
        fleet = self._fleet
        fleet.shutting_down = True
        fleet.end_in_order(list(fleet.workers.values()), now, "llmosd is shutting down")
        fleet.bound_order(now, event.within_s)
        for model in fleet.models.values():
            fleet.touch(model)
        fleet.note_all_down()


def _changed(limits: Limits, changes: dict[str, object]) -> Limits:
    """`limits` with some of them changed, checked as a model file's are; None gives a limit its default again."""
    values: dict[str, object] = {name: getattr(limits, name) for name in limits.__struct_fields__} | changes
    written = {
        name: encode_quantity(value) if isinstance(value, Quantity) else value
        for name, value in values.items()
        if value is not None
    }
    try:
        return msgspec.convert(written, Limits, dec_hook=decode_quantity)
    except (msgspec.ValidationError, ValueError) as error:
        raise CommandError("invalid", f"these limits cannot be set: {error}") from None

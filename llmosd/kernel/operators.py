"""What operators command: apply, remove, start, stop, restart, reset, kill, limits. For the kernel.

Every command is answered at once with `Replied`: done means that the kernel has taken it on; what becomes of it shows
in the workers' states.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from llmosd.kernel import effects as do
from llmosd.kernel import events as on
from llmosd.kernel.fleet import Fleet
from llmosd.kernel.lifecycle import ALIVE, State, Trigger
from llmosd.kernel.routing import Routing
from llmosd.kernel.spec import KERNEL_LIMITS, Limits
from llmosd.kernel.worker import Model, Worker

SIGKILL: Final = 9
SIGCONT: Final = 18
SIGSTOP: Final = 19


class Refusal(Exception):
    """A command that is not carried out. `code`: not_found, refused or invalid."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Operators:
    """Commands over a fleet and its requests. Each method returns the workers it concerns, or raises Refusal."""

    def __init__(self, fleet: Fleet, routing: Routing, out: list[do.Effect]) -> None:
        self._fleet = fleet
        self._routing = routing
        self._out = out

    def _find(self, name: str) -> tuple[Model, list[Worker], bool]:
        """(model, workers, whether the name is the model's) for a model's, an alias's or a worker's name."""
        fleet = self._fleet
        if (worker := fleet.workers.get(name)) is not None:
            return fleet.models[worker.model], [worker], False
        model = fleet.models.get(fleet.names.get(name, name))
        if model is None:
            known = ", ".join(sorted(fleet.models)) or "none"
            raise Refusal("not_found", f"no model or worker {name!r}; models: {known}")
        return model, list(model.workers.values()), True

    def apply(self, event: on.Apply, now: float) -> list[Worker]:
        fleet, spec = self._fleet, event.spec
        name = spec.model
        for other in (name, *spec.aliases):
            if fleet.names.get(other, name) != name:
                raise Refusal("refused", f"the name {other!r} belongs to model {fleet.names[other]} already")
        model = fleet.models.get(name)
        if model is None:
            model = fleet.models[name] = Model(spec)
            self._out.append(do.Happened("applied", name, "new model", name))
        elif model.spec == spec and not model.removed:
            return []
        else:
            self._change(model, spec, now)
        for alias in [alias for alias, owner in fleet.names.items() if owner == name]:
            del fleet.names[alias]
        fleet.names.update(dict.fromkeys((name, *spec.aliases), name))
        self._routing.dispatch(model, now)
        return list(model.workers.values())

    def _change(self, model: Model, spec: Any, now: float) -> None:
        """Limits and scale change on the run; anything else starts the model's workers again, one life later."""
        old, model.spec, model.removed = model.spec, spec, False
        self._out.append(do.Happened("applied", spec.model, "changed model", spec.model))
        live = msgspec.structs.replace(old, limits=spec.limits, scale=spec.scale, aliases=spec.aliases,
                                       restart=spec.restart, timeouts=spec.timeouts)  # fmt: skip
        for worker in list(model.workers.values()):
            if live == spec:
                worker.spec = spec
                self._confine(worker, spec.limits)
            elif worker.state in ALIVE and not worker.stop_wanted:
                self._fleet.end(worker, now, "its model file has changed", again=True)

    def remove(self, event: on.Remove, now: float) -> list[Worker]:
        model, workers, whole = self._find(event.model)
        if not whole:
            raise Refusal("invalid", f"{event.model} is a worker; remove its model, {model.spec.model}")
        model.removed = True
        self._out.append(do.Happened("removed", model.spec.model, "", model.spec.model))
        for worker in workers:
            self._fleet.end(worker, now, "its model was removed")
        self._routing.dispatch(model, now)
        if not any(worker.state in ALIVE for worker in workers):
            self._fleet.forget(model)
        return workers

    def start(self, event: on.Start, now: float) -> list[Worker]:
        model, workers, whole = self._find(event.name)
        if whole:
            model.held = False
        for worker in workers:
            worker.held = worker.rested = False
        if whole and not any(worker.state in ALIVE for worker in workers):
            startable = [w for w in workers if w.state is not State.STOPPED] or workers
            workers = startable[:1] or [self._fleet.add(model)]
        for worker in workers:
            if worker.state in ALIVE:
                continue
            worker.failures = 0
            worker.starts.clear()
            if refusal := self._fleet.start(worker, now):
                raise Refusal("refused", f"{worker.name} {refusal}")
        self._routing.dispatch(model, now)
        return [worker for worker in workers if worker.state in ALIVE]

    def stop(self, event: on.Stop, now: float) -> list[Worker]:
        model, workers, whole = self._find(event.name)
        if whole:
            model.held = True
        for worker in workers:
            worker.held = True
            self._fleet.end(worker, now, "stopped by an operator", at_once=event.now)
        self._routing.dispatch(model, now)
        return workers

    def restart(self, event: on.Restarted, now: float) -> list[Worker]:
        model, workers, _ = self._find(event.name)
        running = [worker for worker in workers if worker.state in ALIVE]
        if not running:
            return self.start(on.Start(event.call, event.name), now)
        for worker in running:
            worker.held = model.held = False
            self._fleet.end(worker, now, "restarted by an operator", again=True)
        return running

    def reset(self, event: on.Reset, now: float) -> list[Worker]:
        model, workers, _ = self._find(event.name)
        for worker in workers:
            worker.failures = 0
            worker.starts.clear()
            worker.rested = False
            self._fleet.fire(worker, Trigger.RESET, now, "")
        self._routing.dispatch(model, now)
        return workers

    def kill(self, event: on.Kill, now: float) -> list[Worker]:
        request = self._request(event.name)
        if request is not None:
            self._routing.cancel(request, "cancelled by an operator", now)
            return []
        _, workers, _ = self._find(event.name)
        alive = [worker for worker in workers if worker.state in ALIVE and worker.pid]
        if not alive:
            raise Refusal("refused", f"no process of {event.name} runs")
        for worker in alive:
            self._signal(worker, event.signal, now)
        return alive

    def _signal(self, worker: Worker, signal: int, now: float) -> None:
        if signal == SIGKILL:
            self._out.append(do.KillGroup(worker.name, worker.incarnation))
        elif signal in (SIGSTOP, SIGCONT):
            trigger = Trigger.FREEZE if signal == SIGSTOP else Trigger.THAW
            verb = "freeze" if signal == SIGSTOP else "thaw"
            if not self._fleet.fire(worker, trigger, now, "frozen by an operator" if verb == "freeze" else ""):
                raise Refusal("refused", f"cannot {verb} {worker.name} while it is {worker.state}")
        else:
            self._out.append(do.Signal(worker.name, worker.incarnation, signal))

    def _request(self, name: str) -> bytes | None:
        """The id of a request, given whole or by a prefix of at least 6 digits that fits only one."""
        if len(name) < 6 or any(c not in "0123456789abcdef" for c in name):
            return None
        found = [rid for rid in self._routing.requests if rid.hex().startswith(name)]
        return found[0] if len(found) == 1 else None

    def set_limits(self, event: on.SetLimits, now: float) -> list[Worker]:
        model, workers, whole = self._find(event.name)
        if whole:
            limits = _changed(model.spec.limits, event.changes)
            model.spec = msgspec.structs.replace(model.spec, limits=limits)
        for worker in workers:
            worker.spec = msgspec.structs.replace(worker.spec, limits=_changed(worker.spec.limits, event.changes))
            self._confine(worker, _changed(worker.limits, event.changes))
        self._routing.dispatch(model, now)
        return workers

    def _confine(self, worker: Worker, limits: Limits) -> None:
        changed = {name for name in limits.__struct_fields__ if getattr(limits, name) != getattr(worker.limits, name)}
        worker.limits, worker.slots = limits, limits.slots
        if changed - KERNEL_LIMITS and worker.state in ALIVE:
            self._out.append(do.Confine(worker.name, worker.incarnation, limits))

    def shut_down(self, now: float) -> None:
        self._fleet.shutting_down = True
        for worker in list(self._fleet.workers.values()):
            self._fleet.end(worker, now, "llmosd is shutting down")
        for model in list(self._fleet.models.values()):
            self._routing.dispatch(model, now)
        self._fleet.note_all_down()


def _changed(limits: Limits, changes: dict[str, object]) -> Limits:
    defaults = Limits()
    values = {name: getattr(defaults, name) if value is None else value for name, value in changes.items()}
    return msgspec.structs.replace(limits, **values)

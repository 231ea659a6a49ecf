"""How many workers each model has: started on demand, within bounds and resources; idle ones make room. For the kernel.

Starts and evicts workers by way of the fleet; it must never touch a request.
"""

from __future__ import annotations

import math
from typing import Final

from llmosd.kernel.eviction import victims
from llmosd.kernel.fleet import Fleet
from llmosd.kernel.lifecycle import ALIVE, COMING, State
from llmosd.kernel.worker import Model, Worker

_ENDING: Final = frozenset({State.STOPPING, State.DRAINING, State.UNKILLABLE})
#: States from which there will be, sooner or later, a worker to run what waits.
_HOPE: Final = COMING | {State.READY, State.FROZEN, State.ASLEEP, State.DRAINING, State.STOPPING}


class Demand:
    """Decides how many workers a fleet has."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def balance(self, model: Model, outstanding: int, now: float) -> str:
        """Have as many workers as are needed. Returns why requests that wait now would wait for ever, or "".

        The number is what the outstanding requests fill, within [scale.min, scale.max].
        """
        fleet, name, scale = self._fleet, model.spec.model, model.spec.scale
        fleet.short.pop(name, None)
        model.why = ""
        if fleet.shutting_down:
            return "llmosd is shutting down"
        if model.removed:
            return f"model {name} was removed"
        if model.held:
            return f"model {name} was stopped by an operator; `llmos start {name}` starts it"
        if not fleet.counted:
            return ""
        desired = max(scale.min, min(scale.max, math.ceil(outstanding / max(1, model.spec.limits.slots))))
        for _ in range(desired - kept(model)):
            worker = self._startable(model, demanded=outstanding > 0)
            if worker is None:
                break
            model.why = self.start(worker, now)
            if model.why:
                break
        if any(w.state in _HOPE and not (w.held and w.state in _ENDING) for w in model.workers.values()):
            return ""
        if model.why:
            never = fleet.ledger.could_ever_fit(model.spec.resources, model.spec.limits.allowed_cpus)
            return f"{name} cannot be started on this machine: {never}" if never else ""
        for worker in model.workers.values():
            if worker.state in (State.FAILED, State.UNKILLABLE):
                return f"worker {worker.name} has failed: {worker.why}; `llmos reset {name}` clears it"
        return f"every worker of {name} was stopped by an operator; `llmos start {name}` starts it"

    def start(self, worker: Worker, now: float) -> str:
        """Start a worker; idle ones of other models go where it does not fit. Returns why not now, or ""."""
        fleet = self._fleet
        refusal = fleet.start(worker, now)
        if refusal and fleet.counted and not fleet.shutting_down:
            fleet.short[worker.model] = None
            going = (State.STOPPING, State.DRAINING)
            leaving = [w for w in fleet.workers.values() if w.state in going and not w.start_after]
            spec, idle = fleet.models[worker.model].spec, self._evictable(worker.model)
            for victim in victims(fleet.ledger, leaving, idle, spec.resources, spec.limits.allowed_cpus):
                fleet.end(victim, now, f"makes room for {worker.name}")
        return refusal

    def trim(self, model: Model, now: float) -> None:
        """End workers above scale.max, the idlest first."""
        most = max(model.spec.scale.min, model.spec.scale.max)
        up = [worker for worker in model.workers.values() if _is_kept(worker)]
        for worker in sorted(up, key=lambda worker: (worker.running, worker.idle_since))[: max(0, len(up) - most)]:
            self._fleet.end(worker, now, f"scale.max is {most} now")

    def _evictable(self, asker: str) -> list[Worker]:
        models = self._fleet.models
        return [
            worker
            for worker in self._fleet.workers.values()
            if worker.state is State.READY
            and worker.model != asker
            and worker.spec.kind == "model"
            and not worker.running
            and not models[worker.model].queue
            and kept(models[worker.model]) > models[worker.model].spec.scale.min
        ]

    def _startable(self, model: Model, demanded: bool) -> Worker | None:
        for worker in model.workers.values():
            if worker.state is State.STOPPED and not worker.held and (demanded or not worker.rested):
                return worker
        if len(model.workers) >= max(model.spec.scale.max, model.spec.scale.min):
            return None
        return self._fleet.add(model)


def kept(model: Model) -> int:
    """Workers that are up, or coming."""
    return sum(map(_is_kept, model.workers.values()))


def _is_kept(worker: Worker) -> bool:
    if worker.state in _ENDING:
        return worker.state is State.STOPPING and not worker.stop_wanted  # it died, and may come back
    return worker.state is State.BACKOFF or worker.state in ALIVE

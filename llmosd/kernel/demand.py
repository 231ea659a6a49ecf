"""How many workers each model has: started on demand, within bounds and resources; idle ones make room. For the kernel.

Starts and evicts workers by way of the fleet; it must never touch a request.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

from llmosd.kernel.dependencies import worn_out
from llmosd.kernel.eviction import idlest_first, victims
from llmosd.kernel.fleet import Fleet
from llmosd.kernel.lifecycle import ALIVE, COMING, State, Trigger
from llmosd.kernel.worker import Model, Worker

_ENDING: Final = frozenset({State.STOPPING, State.DRAINING, State.UNKILLABLE})


class Demand:
    """Decides how many workers a fleet has."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def balance(self, model: Model, outstanding: int, now: float) -> str:
        """Have as many workers as are needed. Returns why requests that wait now would wait for ever, or "".

        The number is what the outstanding requests fill, within [scale.min, scale.max].
        """
        fleet = self._fleet
        fleet.short.pop(model.spec.model, None)
        if fleet.shutting_down:
            return "llmosd is shutting down"
        before, model.why = (model.why, model.hopeless), ""
        down = model.removed or model.held
        if fleet.counted and not down:
            self._start_wanted(model, outstanding, now)
        model.hopeless = fleet.dependencies.hopeless(model, now) if fleet.counted or down else None
        if (model.why, model.hopeless) != before:
            for other in fleet.dependencies.above(model):
                fleet.touch(other)
        return " ".join(model.hopeless or ())

    def _start_wanted(self, model: Model, outstanding: int, now: float) -> None:
        scale, dependencies = model.spec.scale, self._fleet.dependencies
        filled = math.ceil(outstanding / max(1, model.spec.limits.slots))
        asked = sum(worker.asked and worker.state is State.STOPPED for worker in model.workers.values())
        wanted = max(filled, dependencies.kept(model), asked and kept(model) + asked)
        desired = max(scale.min, min(scale.max, wanted))
        for waiting in [worker for worker in model.workers.values() if worker.state is State.WAITING]:
            model.why = self.start(waiting, now)
        for _ in range(desired - kept(model)):
            worker = self._startable(model, outstanding > 0, now)
            if worker is None:
                break
            model.why = self.start(worker, now)
            if model.why:
                break
        if not model.why and (lack := dependencies.lack(model)) is not None and lack.hopeless:
            model.why = lack.why  # said before anybody finds out by wanting it

    def start(self, worker: Worker, now: float) -> str:
        """Start a worker, or have it wait for what its model requires; idle ones of other models go where it does not
        fit. Returns why it is not started now, or "".
        """
        fleet, model = self._fleet, self._fleet.models[worker.model]
        lack = fleet.dependencies.lack(model) if fleet.counted and not fleet.shutting_down else None
        if lack is None:
            refusal = fleet.start(worker, now)
        elif lack.hopeless:
            worker.asked = False
            fleet.give_up(worker, now, lack.why)
            return lack.why
        elif not (refusal := self._no_room_for_all(model)):
            fleet.fire(worker, Trigger.AWAIT, now, lack.why)
            return lack.why
        if refusal and fleet.counted and not fleet.shutting_down:
            fleet.give_up(worker, now, f"waits for resources: {refusal}")
            fleet.short[worker.model] = None
            if lack is None:
                self._make_room(worker, now)
        return refusal

    def _make_room(self, worker: Worker, now: float) -> None:
        fleet, model = self._fleet, self._fleet.models[worker.model]
        leaving, want, allowed = self._leaving(), model.spec.resources, model.spec.limits.allowed_cpus
        found = victims(fleet.ledger, leaving, self._evictable(model, fleet.dependencies.needed), want, allowed)
        # Else two that lack resources could keep from each other, for ever, what is there only because they require it.
        found = found or victims(fleet.ledger, leaving, self._evictable(model, fleet.dependencies.kept), want, allowed)
        for victim in found:
            fleet.end(victim, now, f"makes room for {worker.name}")

    def _no_room_for_all(self, model: Model) -> str:
        """Why a worker does not fit together with those that must be started before it, or "".

        What is required is started only if there is room for who requires it too, were all idle ones gone: it would
        else take the room of others and serve nobody. Two that do not fit beside each other would take turns in ending
        what the other has just had started; so what one stands on that only lacks resources does not count as idle.
        """
        fleet = self._fleet
        trial = fleet.ledger.copy()
        for worker in (*self._leaving(), *self._evictable(model, fleet.dependencies.stood_on)):
            trial.release(worker.name)
        down = [name for name in sorted(fleet.dependencies.below(model)) if not kept(fleet.models[name])]
        for name in (*down, model.spec.model):
            spec = fleet.models[name].spec
            refusal = trial.reserve(name, spec.resources, spec.limits.allowed_cpus)
            if isinstance(refusal, str):
                return refusal if name == model.spec.model else f"{name}, which it requires, {refusal}"
        return ""

    def _leaving(self) -> list[Worker]:
        going = (State.STOPPING, State.DRAINING)
        return [w for w in self._fleet.workers.values() if (w.state in going or w.ending) and not w.start_after]

    def trim(self, model: Model, now: float) -> None:
        """End workers above scale.max, the idlest first."""
        most = max(model.spec.scale.min, model.spec.scale.max)
        up = [worker for worker in model.workers.values() if _is_kept(worker)]
        for worker in sorted(up, key=lambda worker: (worker.running, worker.idle_since))[: max(0, len(up) - most)]:
            self._fleet.end(worker, now, f"scale.max is {most} now")

    def _evictable(self, asker: Model, needed: Callable[[Model], bool]) -> list[Worker]:
        """Idle workers of others, of each model so many that as many as it must have are left."""
        found: list[Worker] = []
        below = self._fleet.dependencies.below(asker)
        for name, model in self._fleet.models.items():
            if name == asker.spec.model or name in below or model.spec.kind != "model" or model.queue:
                continue
            idle = [w for w in model.workers.values() if w.state is State.READY and not w.running and not w.ending]
            if idle:
                found += sorted(idle, key=idlest_first)[: spare(model, needed(model))]
        return found

    def _startable(self, model: Model, demanded: bool, now: float) -> Worker | None:
        awaited = not demanded and self._fleet.dependencies.awaited(model)
        for worker in sorted(model.workers.values(), key=lambda worker: not worker.asked):
            fresh = demanded or not worker.rested or (awaited and not worn_out(worker, now))
            if worker.state is State.STOPPED and not worker.held and fresh:
                return worker
        return self._fleet.add(model) if model.has_room() else None


def kept(model: Model) -> int:
    """Workers that are up, or coming."""
    return sum(map(_is_kept, model.workers.values()))


def spare(model: Model, needed: bool) -> int:
    """How many of its ready workers may go. `needed`: by another model, which wants one that is ready."""
    ready = sum(worker.state is State.READY and not worker.ending for worker in model.workers.values())
    return max(0, min(kept(model) - model.spec.scale.min, ready - needed))


def _is_kept(worker: Worker) -> bool:
    if worker.state in _ENDING or worker.ending:
        return worker.state is State.STOPPING and not worker.stop_wanted  # it died, and may come back
    return worker.state in COMING or worker.state in ALIVE

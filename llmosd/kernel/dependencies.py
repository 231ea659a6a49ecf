"""What models require of each other: who waits for whom, who is needed, what can never be. Pure reads; for the kernel.

`requires` means what systemd's Requires= and After= mean together: what is required is started first and stopped last,
and an operator's stop or restart of it is passed on to who requires it. Its crash is not (there is no BindsTo=).
Applied models never require each other in a circle: `cycle` refuses the one that would close it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from llmosd.kernel.ledger import Ledger
from llmosd.kernel.lifecycle import ALIVE, COMING, State
from llmosd.kernel.spec import ModelSpec
from llmosd.kernel.worker import Hopeless, Model, Worker

#: States from which there will be, sooner or later, a worker to run what waits.
_HOPE: Final = COMING - {State.WAITING} | {State.READY, State.FROZEN, State.ASLEEP, State.DRAINING, State.STOPPING}
_ENDING: Final = frozenset({State.STOPPING, State.DRAINING, State.UNKILLABLE})
#: States with a process that may make use of what is required. No instruction of an unkillable one will ever run again.
UP: Final = ALIVE - {State.UNKILLABLE}


class Lack(NamedTuple):
    """What a model requires and has not. `hopeless`: it will not come without somebody's help."""

    why: str
    hopeless: bool


class Dependencies:
    """The models of a fleet, as they require each other."""

    def __init__(self, models: dict[str, Model], names: dict[str, str], short: dict[str, None], ledger: Ledger) -> None:
        self._models = models
        self._names = names
        #: Models that wait for resources.
        self._short = short
        self._ledger = ledger
        #: By each name that is required, as it is written, the models that require it.
        self._users: dict[str, dict[str, None]] = {}

    def note(self, model: str, old: Iterable[str], new: Iterable[str]) -> None:
        """A model's `requires` was declared, changed or forgotten."""
        for name in dict.fromkeys(old):
            self._users[name].pop(model, None)
            if not self._users[name]:
                del self._users[name]
        for name in new:
            self._users.setdefault(name, {})[model] = None

    # -- neighbours -----------------------------------------------------------------------------------------

    def find(self, name: str) -> Model | None:
        return self._models.get(self._names.get(name, name))

    def required(self, model: Model) -> list[Model]:
        """Those that it names and that there are."""
        return [other for name in model.spec.requires if (other := self.find(name)) is not None]

    def users(self, model: Model) -> list[Model]:
        """Those that require it."""
        if not self._users:
            return []
        own = model.spec.model
        names = [name for name in (own, *model.spec.aliases) if self._names.get(name, name) == own]
        return [self._models[user] for name in names for user in self._users.get(name, ())]

    def above(self, model: Model) -> list[Model]:
        """Those that require it, and whatever requires them."""
        found: dict[str, Model] = {}
        pending = self.users(model)
        while pending:
            one = pending.pop()
            if one.spec.model not in found:
                found[one.spec.model] = one
                pending += self.users(one)
        return list(found.values())

    def below(self, model: Model) -> set[str]:
        """Names of what it requires, and of whatever that requires."""
        found: set[str] = set()
        pending = self.required(model)
        while pending:
            one = pending.pop()
            if one.spec.model not in found:
                found.add(one.spec.model)
                pending += self.required(one)
        return found

    # -- what is there --------------------------------------------------------------------------------------

    def lack(self, model: Model) -> Lack | None:
        """What stands in the way of a start: what will never come before what is on its way."""
        waits = None
        for name in model.spec.requires:
            other = self.find(name)
            if other is None or other.removed:
                return Lack(f"requires {name}, which there is not", True)
            if not ready(other):
                if other.hopeless is not None:
                    return Lack(f"requires {name}, which {other.hopeless.why}", True)
                waits = waits or Lack(f"waits for {name}: {_progress(other)}", False)
        return waits

    def needed(self, model: Model) -> bool:
        """Whether one that requires it has a worker that is up or on its way, or that only lacks resources."""
        return self.kept(model) or any(user.spec.model in self._short for user in self.users(model))

    def kept(self, model: Model) -> bool:
        """Whether one that requires it has a worker that is up or on its way: then nobody's need makes it go."""
        return any(w.state in UP or w.state in COMING for user in self.users(model) for w in user.workers.values())

    def stood_on(self, model: Model) -> bool:
        """Whether it is kept, or one that requires it has all that it requires, and only lacks resources."""
        users = self.users(model)
        return self.kept(model) or any(user.spec.model in self._short and self.lack(user) is None for user in users)

    def awaited(self, model: Model) -> bool:
        """Whether a worker of another is started as soon as it is ready."""
        return any(w.state is State.WAITING for user in self.users(model) for w in user.workers.values())

    def in_use(self, model: Model) -> list[Worker]:
        """The workers that must be down before the last of its own ends."""
        return [worker for user in self.users(model) for worker in user.workers.values() if worker.state in UP]

    # -- what can never be ----------------------------------------------------------------------------------

    def hopeless(self, model: Model, now: float) -> Hopeless | None:
        """Why no worker of a model will ever be ready without somebody's help, or None."""
        name = model.spec.model
        if model.removed:
            return Hopeless(f"model {name}", "was removed")
        if model.held:
            return Hopeless(f"model {name}", f"was stopped by an operator; `llmos start {name}` starts it")
        workers = model.workers.values()
        if any(worker.state in _HOPE and not (worker.held and worker.state in _ENDING) for worker in workers):
            return None
        startable = [w for w in workers if w.state in (State.STOPPED, State.WAITING) and not w.held]
        if startable or model.has_room():
            if (lack := self.lack(model)) is not None and lack.hopeless:
                return Hopeless(name, lack.why)
            if never := self._never_fits(model):
                return Hopeless(name, never)
            if not startable or not all(worn_out(worker, now) for worker in startable) or not self.users(model):
                return None
            return Hopeless(name, f"ended by itself: {startable[0].why}; `llmos start {name}` starts it")
        for worker in workers:
            if worker.state in (State.FAILED, State.UNKILLABLE):
                return Hopeless(f"worker {worker.name}", f"has failed: {worker.why}; `llmos reset {name}` clears it")
        return Hopeless(f"every worker of {name}", f"was stopped by an operator; `llmos start {name}` starts it")

    def _never_fits(self, model: Model) -> str:
        """Why an empty machine could not hold a worker of a model and of all that it requires, or ""."""
        beside = sorted(self.below(model))
        specs = [self._models[name].spec for name in beside]
        others = [(spec.resources, spec.limits.allowed_cpus) for spec in specs]
        refusal = self._ledger.could_ever_fit(model.spec.resources, model.spec.limits.allowed_cpus, others)
        if refusal is None:
            return ""
        where = f" beside {', '.join(beside)}, which it requires" if beside else ""
        return f"cannot be started on this machine{where}: {refusal}"

    def cycle(self, spec: ModelSpec) -> str:
        """The circle that applying `spec` would close, written out, or ""."""
        own = {spec.model, *spec.aliases}
        came_from: dict[str, str] = {}
        pending = [spec.model]
        for name in pending:
            for other in self._required_with(spec, own, name):
                if other == spec.model:
                    way = [other, name]
                    while way[-1] != spec.model:
                        way.append(came_from[way[-1]])
                    return " requires ".join(reversed(way))
                if other not in came_from:
                    came_from[other] = name
                    pending.append(other)
        return ""

    def _required_with(self, spec: ModelSpec, own: set[str], name: str) -> Iterator[str]:
        """What a model would require, by the models' own names, were `spec` applied."""
        if name == spec.model:
            required: tuple[str, ...] = spec.requires
        else:
            model = self._models.get(name)
            required = () if model is None or model.removed else model.spec.requires
        for one in required:
            other = spec.model if one in own else self._names.get(one, one)
            if other != spec.model or one in own:  # else an alias that it has no longer
                yield other

    # -- the order of a shutdown ----------------------------------------------------------------------------

    def ranks(self) -> dict[str, int]:
        """For each model, by how many others in a row it is used: 0 ends first. (Kahn's algorithm.)"""
        waits = {name: len({user.spec.model for user in self.users(model)}) for name, model in self._models.items()}
        ranks = {name: 0 for name, count in waits.items() if not count}
        pending = list(ranks)
        for name in pending:
            for other in {other.spec.model for other in self.required(self._models[name])}:
                waits[other] -= 1
                ranks[other] = max(ranks.get(other, 0), ranks[name] + 1)
                if not waits[other]:
                    pending.append(other)
        return ranks


def ready(model: Model) -> bool:
    """Whether a worker is ready, and meant to stay so."""
    return any(worker.state is State.READY and not worker.stop_wanted for worker in model.workers.values())


def worn_out(worker: Worker, now: float) -> bool:
    """It ended by itself as often as its start limit allows: that somebody requires it does not start it again.

    As in systemd, the limit is for all starts that no operator asked for. Else what ends at once would be started
    again and again for who waits for it, without any back-off.
    """
    return worn_out_until(worker) > now


def worn_out_until(worker: Worker) -> float:
    """Until when that is so."""
    restart = worker.spec.restart
    if not worker.rested or not restart.burst or len(worker.starts) < restart.burst:
        return 0.0
    return worker.starts[-restart.burst] + restart.interval


def _progress(model: Model) -> str:
    """How far a model is that has no ready worker."""
    for worker in model.workers.values():
        if worker.state in UP and worker.stop_wanted:
            return "it is restarted" if worker.start_after else "it is being stopped"
        if worker.state is State.WAITING:
            return f"it {worker.why}"
        if worker.state is State.BACKOFF:
            return f"it is tried again: {worker.why}"
        if worker.state in _HOPE:
            return f"it is {worker.state}"
    return f"it waits for resources: {model.why}" if model.why else "it is to be started"

"""What operators have stopped: it stays down until they start it or the machine is booted, whoever restarts the daemon.

For the kernel. The flags are in the models and workers; here is what leaves the kernel and comes back into the next.
"""

from __future__ import annotations

from llmosd.kernel import effects as do
from llmosd.kernel import events as on
from llmosd.kernel.fleet import Fleet
from llmosd.kernel.worker import Model


class Holds:
    """The names of held models and workers."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        #: Held by an earlier daemon, and not known here, or not yet: a model's file may be damaged just now.
        self._unknown: set[str] = set()
        self._kept = self._held()

    def _held(self) -> do.KeepHeld:
        fleet = self._fleet
        models = {model.spec.model for model in fleet.models.values() if model.held}
        workers = {worker.name for worker in fleet.workers.values() if worker.held}
        models |= {name for name in self._unknown if "@" not in name}
        workers |= {name for name in self._unknown if "@" in name}
        return do.KeepHeld(tuple(sorted(models)), tuple(sorted(workers)))

    def recall(self, event: on.Held) -> None:
        """What an earlier daemon kept."""
        self._unknown |= {*event.models, *event.workers}
        for model in self._fleet.models.values():
            self.settle(model)
        self._kept = self._held()

    def settle(self, model: Model) -> None:
        """A model has become known: hold what is held of it."""
        own = model.spec.model
        for name in sorted(name for name in self._unknown if name.partition("@")[0] == own):
            self._unknown.discard(name)
            if name == own:
                model.held = True
            else:
                worker = model.workers.get(name) or self._fleet.add(model, name)
                worker.held, worker.why = True, worker.why or "stopped by an operator"

    def forget(self, model: Model) -> None:
        """A model is removed. If one of its name comes again, nobody has stopped it."""
        model.held = False
        for worker in model.workers.values():
            worker.held = False

    def changed(self) -> do.KeepHeld | None:
        """What is to be kept now, if that has changed since it was asked last."""
        held = self._held()
        if held == self._kept:
            return None
        self._kept = held
        return held

"""Which idle workers must go so that another fits. Pure.

Least recently used first, and only workers that nobody uses: a busy one is never evicted for an equal.
"""

from __future__ import annotations

from collections.abc import Iterable

from llmosd.kernel.ledger import Ledger
from llmosd.kernel.spec import Resources
from llmosd.kernel.worker import Worker


def victims(ledger: Ledger, idle: Iterable[Worker], want: Resources) -> list[Worker]:
    """Of `idle`, the workers to stop so that `want` fits; none if even all of them would not do."""
    trial = ledger.copy()
    chosen: list[Worker] = []
    for worker in sorted(idle, key=lambda worker: worker.idle_since):
        trial.release(worker.name)
        chosen.append(worker)
        if not isinstance(trial.reserve("", want), str):
            return chosen
    return []

"""Which idle workers must go so that another fits. Pure; for the kernel.

Least recently used first, and only workers that run nothing: a busy one is never evicted for an equal. Those that
still keep answers for slow readers come last, for stopping them waits for the readers, within the drain timeout.
"""

from __future__ import annotations

from collections.abc import Iterable

from llmosd.kernel.ledger import Ledger
from llmosd.kernel.spec import Resources
from llmosd.kernel.units import CpuSet
from llmosd.kernel.worker import Worker


def idlest_first(worker: Worker) -> tuple[bool, float]:
    return bool(worker.requests), worker.idle_since


def victims(
    ledger: Ledger,
    leaving: Iterable[Worker],
    idle: Iterable[Worker],
    want: Resources,
    allowed_cpus: CpuSet | None = None,
) -> list[Worker]:
    """Of `idle`, the workers to stop so that `want` fits once those `leaving` are gone too.

    None if what leaves is enough, and none if even all of them would not do.
    """
    trial = ledger.copy()
    for worker in leaving:
        trial.release(worker.name)
    chosen: list[Worker] = []
    for worker in sorted(idle, key=idlest_first):
        if trial.fits(want, allowed_cpus):
            return chosen
        trial.release(worker.name)
        chosen.append(worker)
    return chosen if trial.fits(want, allowed_cpus) else []

"""Keeps every live worker on the CPUs that it may use: its own, or those that are nobody's own. For the fleet.

The node knows only `allowed_cpus` among a worker's limits. Here it is put in: what the limits ask for as long as no
worker has CPUs of its own, so that nobody is pinned for nothing; else the worker's own, or what is left of what it
asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec

from llmosd.kernel import effects as do
from llmosd.kernel.ledger import Ledger
from llmosd.kernel.lifecycle import ALIVE, State
from llmosd.kernel.spec import KERNEL_LIMITS, Limits
from llmosd.kernel.units import CpuSet
from llmosd.kernel.worker import Worker

#: Not worth a move: its CPUs are free soon.
_ENDING: Final = frozenset({State.STOPPING, State.DRAINING, State.UNKILLABLE})


class Pinning:
    """See the module."""

    def __init__(self, ledger: Ledger, workers: Mapping[str, Worker], out: list[do.Effect]) -> None:
        self._ledger = ledger
        self._workers = workers
        self._out = out
        self._pool: CpuSet | None = None
        #: The CPUs are known. Until then what is in force stays.
        self._counted = False

    def limits(self, worker: Worker) -> Limits:
        """What is to be in force on a worker."""
        return msgspec.structs.replace(worker.limits, allowed_cpus=self._cpus(worker))

    def _cpus(self, worker: Worker) -> CpuSet | None:
        if not self._counted:
            return worker.in_force.allowed_cpus
        grant, asked, pool = self._ledger.grant_of(worker.name), worker.limits.allowed_cpus, self._ledger.pool()
        if grant is not None and grant.cpus:
            return CpuSet(grant.cpus)
        # An empty pool is that of a machine that lost CPUs while its workers lived.
        if not pool or asked is None:
            return pool or asked
        # Nothing in common: a changed model file asks for others' own. Those stay theirs.
        return CpuSet(set(asked) & set(pool)) or pool

    def warn(self, worker: Worker) -> None:
        """Say so where what a worker's limits ask for cannot be in force."""
        why = self._ledger.why_not_allow(worker.name, worker.limits.allowed_cpus) if self._counted else ""
        if why:
            where = f"{why}; until they are free it runs on {self._cpus(worker)}"
            self._out.append(do.Happened("warning", worker.name, where, worker.model))

    def confine(self, worker: Worker) -> None:
        """Tell the node what is in force on a worker, if it changed. One that is not spawned yet hears of it then."""
        if worker.state not in ALIVE or not worker.pid:
            return
        before, wanted, grant = worker.in_force, self.limits(worker), self._ledger.grant_of(worker.name)
        worker.in_force = wanted
        changed = {name for name in wanted.__struct_fields__ if getattr(wanted, name) != getattr(before, name)}
        if grant is not None and (changed - KERNEL_LIMITS or grant != worker.on_record):
            worker.on_record = grant
            self._out.append(do.Confine(worker.name, worker.incarnation, wanted, grant))

    def settle(self, *, counted: bool = False) -> bool:
        """Reservations have changed: move whom that lets sit better, and tell everybody whose CPUs are others now.

        `counted`: the CPUs have become known. True: other CPUs are shared than before.
        """
        self._counted = self._counted or counted
        if not self._counted:
            return False
        pool = self._ledger.pool()
        if pool is not None:
            self._repack()
            pool = self._ledger.pool()
        if pool == self._pool and not counted:
            return False
        self._pool = pool
        for worker in self._workers.values():
            self.confine(worker)
        return True

    def _repack(self) -> None:
        movable = [name for name, w in self._workers.items() if w.pid and w.state in ALIVE and w.state not in _ENDING]
        for name, (before, after) in self._ledger.repack(movable).items():
            worker = self._workers[name]
            self._out.append(do.Happened("repacked", name, f"CPUs {after} instead of {before}", worker.model))
            self.confine(worker)

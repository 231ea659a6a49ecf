"""The ledger: what the machine has, what is reserved, and for whom. Never over-committed. Pure; for the kernel.

A reservation is made whole or not at all, before a worker is spawned, and given back only when its process group is
empty. CPUs are counted in thousandths, so that sums are exact. Who has CPUs of its own is kept here too, by number; at
least one CPU always stays shared.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterable

import msgspec

from llmosd.kernel.cpus import Claim, Cpu, Topology, place, repack
from llmosd.kernel.placement import FITS, Gpu
from llmosd.kernel.spec import Resources
from llmosd.kernel.units import Bytes, CpuSet


class Capacity(msgspec.Struct, frozen=True):
    """What a node can give away."""

    millicpus: int
    memory_bytes: int
    gpus: tuple[Gpu, ...] = ()
    #: Empty: nobody knows which they are, and no worker can have any for its own.
    cpus: tuple[Cpu, ...] = ()


class Grant(msgspec.Struct, frozen=True):
    """What one worker holds."""

    millicpus: int = 0
    memory_bytes: int = 0
    #: Bytes by GPU UUID.
    gpus: dict[str, int] = {}
    #: CPUs of its own, on which no other worker runs; empty: it shares the others.
    cpus: tuple[int, ...] = ()
    #: What its limits ask for; where there are CPUs of somebody's own, the limits in force have others.
    allowed_cpus: CpuSet | None = None
    #: The NUMA node whose memory it was started to prefer.
    memory_node: int | None = None

    def claim(self) -> Claim:
        return Claim(frozenset(self.cpus), None if self.allowed_cpus is None else frozenset(self.allowed_cpus))


class Ledger:
    """Reservations by owner on one node."""

    def __init__(self, capacity: Capacity, placement: str = "best_fit") -> None:
        self.capacity = capacity
        self.placement = placement
        self._fit = FITS[placement]
        self._grants: dict[str, Grant] = {}

    @property
    def capacity(self) -> Capacity:
        return self._capacity

    @capacity.setter
    def capacity(self, capacity: Capacity) -> None:
        self._capacity = capacity
        self._topology = Topology(capacity.cpus)

    def reserve(self, owner: str, want: Resources, allowed_cpus: CpuSet | None = None) -> Grant | str:
        """Reserve all of `want`, or nothing: then the answer is the reason, as a sentence."""
        if owner in self._grants:
            return f"{owner} already holds a reservation"
        exclusive = max(1, math.ceil(want.cpus)) if want.cpu_placement == "exclusive" else 0
        millicpus = exclusive * 1000 or round(want.cpus * 1000)
        free = self.free()
        if millicpus > free.millicpus:
            return f"needs {want.cpus:g} CPUs; {free.millicpus / 1000:g} of {self.capacity.millicpus / 1000:g} are free"
        if want.memory > free.memory_bytes:
            left, total = Bytes(max(0, free.memory_bytes)), Bytes(self.capacity.memory_bytes)
            return f"needs {want.memory} of memory; {left} of {total} is free"
        gpus: dict[str, int] = {}
        if want.gpu_memory and want.gpus:
            share = -(-want.gpu_memory // want.gpus)
            chosen = self._fit(free.gpus, want.gpus, share)
            if chosen is None:
                have = ", ".join(f"{gpu.uuid}: {Bytes(gpu.memory_bytes)} free" for gpu in free.gpus)
                return f"needs {Bytes(share)} of GPU memory on each of {want.gpus} GPU(s); {have or 'there is no GPU'}"
            gpus = dict.fromkeys(chosen, share)
        cpus = self._place(owner, exclusive, allowed_cpus)
        if isinstance(cpus, str):
            return cpus
        near = self._topology.memory_node(cpus)
        grant = self._grants[owner] = Grant(millicpus, int(want.memory), gpus, tuple(cpus), allowed_cpus, near)
        return grant

    def fits(self, want: Resources, allowed_cpus: CpuSet | None = None) -> bool:
        """Whether all of `want` could be reserved now."""
        trial = self.copy()
        return not isinstance(trial.reserve("", want, allowed_cpus), str)

    def restore(self, owner: str, grant: Grant) -> None:
        """Take over the reservation of a worker that was alive before the daemon was."""
        self._grants[owner] = grant

    def release(self, owner: str) -> None:
        self._grants.pop(owner, None)

    def grant_of(self, owner: str) -> Grant | None:
        return self._grants.get(owner)

    def copy(self) -> Ledger:
        """A ledger to try things out on."""
        other = copy.copy(self)
        other._grants = dict(self._grants)
        return other

    def could_ever_fit(
        self,
        want: Resources,
        allowed_cpus: CpuSet | None = None,
        beside: Iterable[tuple[Resources, CpuSet | None]] = (),
    ) -> str | None:
        """None if an empty machine could hold `want` and what is `beside` it, else the reason why not."""
        empty = Ledger(self.capacity, self.placement)
        for number, (resources, allowed) in enumerate(beside):
            empty.reserve(f"beside {number}", resources, allowed)
        answer = empty.reserve("", want, allowed_cpus)
        return answer if isinstance(answer, str) else None

    def free(self) -> Capacity:
        """What is left. Negative only for what an adopted worker brought on to a machine that shrank."""
        grants = self._grants.values()
        used: dict[str, int] = {}
        for grant in grants:
            for uuid, size in grant.gpus.items():
                used[uuid] = used.get(uuid, 0) + size
        pool = self.pool()
        return Capacity(
            self.capacity.millicpus - sum(grant.millicpus for grant in grants),
            self.capacity.memory_bytes - sum(grant.memory_bytes for grant in grants),
            tuple(Gpu(gpu.uuid, gpu.memory_bytes - used.get(gpu.uuid, 0)) for gpu in self.capacity.gpus),
            tuple(cpu for cpu in self.capacity.cpus if pool is None or cpu.number in pool),
        )

    # -- CPUs by number -------------------------------------------------------------------------------------

    def pool(self) -> CpuSet | None:
        """The CPUs that are nobody's own; None where nobody has any."""
        taken = [grant.cpus for grant in self._grants.values() if grant.cpus]
        return CpuSet(self._topology.cpus.difference(*taken)) if taken else None

    def allow(self, owner: str, allowed_cpus: CpuSet | None) -> bool:
        """Note what a worker's limits ask for now. False: it is what they asked for before."""
        grant = self._grants.get(owner)
        if grant is None or grant.allowed_cpus == allowed_cpus:
            return False
        self._grants[owner] = msgspec.structs.replace(grant, allowed_cpus=allowed_cpus)
        return True

    def why_not_allow(self, owner: str, allowed_cpus: CpuSet | None) -> str:
        """Why a worker that lives cannot be kept on these CPUs, as a sentence, or ""."""
        grant = self._grants.get(owner)
        if grant is None or allowed_cpus is None or (grant.cpus and set(grant.cpus) <= set(allowed_cpus)):
            return ""
        cpus = self._place(owner, len(grant.cpus), allowed_cpus, frozenset(grant.cpus))
        return cpus if isinstance(cpus, str) else ""

    def repack(self, movable: Collection[str]) -> dict[str, tuple[CpuSet, CpuSet]]:
        """Move workers to better CPUs of their own where there are some: before and after, by owner."""
        claims = {owner: grant.claim() for owner, grant in self._grants.items()}
        moves: dict[str, tuple[CpuSet, CpuSet]] = {}
        for owner, cpus in repack(self._topology, claims, [owner for owner in movable if owner in claims]).items():
            grant = self._grants[owner]
            moves[owner] = CpuSet(grant.cpus), CpuSet(cpus)
            self._grants[owner] = msgspec.structs.replace(grant, cpus=tuple(sorted(cpus)))
        return moves

    def _place(
        self, owner: str, exclusive: int, allowed_cpus: CpuSet | None, held: frozenset[int] = frozenset()
    ) -> CpuSet | str:
        """The CPUs of its own for a worker that wants so many; empty where it shares and there is one for it to run on.

        Else the reason, as a sentence.
        """
        if not exclusive and allowed_cpus is None:
            return CpuSet()
        others = {name: grant for name, grant in self._grants.items() if name != owner}
        if exclusive:
            claims = {name: grant.claim() for name, grant in others.items()}
            allowed = None if allowed_cpus is None else frozenset(allowed_cpus)
            found = place(self._topology, exclusive, allowed, claims, held)
            return found if isinstance(found, str) else CpuSet(found)
        assert allowed_cpus is not None
        if self._topology.cpus & set(allowed_cpus):
            owners = [name for name, grant in others.items() if set(grant.cpus) & set(allowed_cpus)]
            taken = {cpu for name in owners for cpu in others[name].cpus}
            if not self._topology.cpus & set(allowed_cpus) - taken:
                return f"its allowed_cpus, {allowed_cpus}, belong to {', '.join(owners)} alone"
        return CpuSet()

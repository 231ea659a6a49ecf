"""The ledger: what the machine has, what is reserved, and for whom. Never over-committed. Pure; for the kernel.

A reservation is made whole or not at all, before a worker is spawned, and given back only when its process group is
empty. CPUs are counted in thousandths, so that sums are exact.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from llmosd.kernel.placement import FITS, Gpu
from llmosd.kernel.spec import Resources
from llmosd.kernel.units import Bytes


class Capacity(msgspec.Struct, frozen=True):
    """What a node can give away."""

    millicpus: int
    memory_bytes: int
    gpus: tuple[Gpu, ...] = ()


class Grant(msgspec.Struct, frozen=True):
    """What one worker holds."""

    millicpus: int = 0
    memory_bytes: int = 0
    #: Bytes by GPU UUID.
    gpus: dict[str, int] = {}


class Ledger:
    """Reservations by owner on one node."""

    def __init__(self, capacity: Capacity, placement: str = "best_fit") -> None:
        self.capacity = capacity
        self.placement = placement
        self._fit = FITS[placement]
        self._grants: dict[str, Grant] = {}

    def reserve(self, owner: str, want: Resources) -> Grant | str:
        """Reserve all of `want`, or nothing: then the answer is the reason, as a sentence."""
        if owner in self._grants:
            return f"{owner} already holds a reservation"
        millicpus = round(want.cpus * 1000)
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
        grant = self._grants[owner] = Grant(millicpus, int(want.memory), gpus)
        return grant

    def fits(self, want: Resources) -> bool:
        """Whether all of `want` could be reserved now."""
        trial = self.copy()
        return not isinstance(trial.reserve("", want), str)

    def restore(self, owner: str, grant: Grant) -> None:
        """Take over the reservation of a worker that was alive before the daemon was."""
        self._grants[owner] = grant

    def release(self, owner: str) -> None:
        self._grants.pop(owner, None)

    def grant_of(self, owner: str) -> Grant | None:
        return self._grants.get(owner)

    def copy(self) -> Ledger:
        """A ledger to try things out on."""
        other = Ledger(self.capacity, self.placement)
        other._grants = dict(self._grants)
        return other

    def could_ever_fit(self, want: Resources, beside: Iterable[Resources] = ()) -> str | None:
        """None if an empty machine could hold `want` and what is `beside` it, else the reason why not."""
        empty = Ledger(self.capacity, self.placement)
        for number, one in enumerate(beside):
            empty.reserve(f"beside {number}", one)
        answer = empty.reserve("", want)
        return answer if isinstance(answer, str) else None

    def free(self) -> Capacity:
        """What is left. Negative only for what an adopted worker brought on to a machine that shrank."""
        grants = self._grants.values()
        used: dict[str, int] = {}
        for grant in grants:
            for uuid, size in grant.gpus.items():
                used[uuid] = used.get(uuid, 0) + size
        return Capacity(
            self.capacity.millicpus - sum(grant.millicpus for grant in grants),
            self.capacity.memory_bytes - sum(grant.memory_bytes for grant in grants),
            tuple(Gpu(gpu.uuid, gpu.memory_bytes - used.get(gpu.uuid, 0)) for gpu in self.capacity.gpus),
        )

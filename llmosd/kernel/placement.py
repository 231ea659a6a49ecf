"""Which GPUs a worker gets: first, best or worst fit. Pure; for the ledger.

The classical allocation rules (Knuth, TAOCP vol. 1, 2.5): first fit takes the first devices with room, best fit those
that are left with the least, worst fit those that are left with the most.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import msgspec


class Gpu(msgspec.Struct, frozen=True):
    """A GPU and the memory on it that may be given away, in bytes."""

    uuid: str
    memory_bytes: int


Fit = Callable[[Sequence[Gpu], int, int], list[str] | None]


def first_fit(gpus: Sequence[Gpu], count: int, size: int) -> list[str] | None:
    """The first `count` GPUs with `size` bytes free each, or None."""
    fitting = [gpu.uuid for gpu in gpus if gpu.memory_bytes >= size]
    return fitting[:count] if len(fitting) >= count else None


def best_fit(gpus: Sequence[Gpu], count: int, size: int) -> list[str] | None:
    """The fullest GPUs that fit: keeps large holes for large models."""
    return first_fit(sorted(gpus, key=lambda gpu: gpu.memory_bytes), count, size)


def worst_fit(gpus: Sequence[Gpu], count: int, size: int) -> list[str] | None:
    """The emptiest GPUs: spreads the load."""
    return first_fit(sorted(gpus, key=lambda gpu: -gpu.memory_bytes), count, size)


FITS: Final[dict[str, Fit]] = {"first_fit": first_fit, "best_fit": best_fit, "worst_fit": worst_fit}

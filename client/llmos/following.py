"""What a client that follows must decide: whether those it waits for have arrived. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

from llmos.errors import WorkerFailed
from llmos.types import Worker

#: States from which a worker that is awaited will not come by itself.
DEAD_ENDS: Final = frozenset({"failed", "unkillable"})
_ENDS: Final = {"failed": "has failed", "backoff": "ended and will be tried again", "stopped": "has stopped"}


def arrived(
    wanted: Collection[str], workers: Sequence[Worker], states: Collection[str], dead_ends: Collection[str]
) -> bool:
    """Whether all of `wanted`, workers' or models' names, are in one of `states`. What is not listed is stopped.

    Raises WorkerFailed when one is in a dead end.
    """
    there = True
    for name in wanted:
        found = [worker for worker in workers if name in (worker.name, worker.model)]
        if not found:
            there = there and "stopped" in states
            if "stopped" in dead_ends and "stopped" not in states:
                raise WorkerFailed(f"{name} is not there any more. See `llmos events`.", name, "stopped")
        for worker in found:
            if worker.state in states:
                continue
            there = False
            if worker.state in dead_ends:
                why = f": {worker.why}" if worker.why else ""
                end = _ENDS.get(worker.state, f"is {worker.state}")
                message = f"{worker.name} {end}{why}. See `llmos logs {worker.name}`."
                raise WorkerFailed(message, worker.name, worker.state)
    return there


def where(workers: Sequence[Worker]) -> str:
    """How far workers have come, in a sentence's part."""
    if not workers:
        return "none is there"
    return ", ".join(f"{w.name} is {w.state}{f' ({w.why})' if w.why else ''}" for w in workers)

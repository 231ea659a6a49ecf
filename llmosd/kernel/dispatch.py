"""Which worker runs the next request: the one with the least outstanding work. Pure.

Least outstanding requests, the rule of most load balancers (for example Envoy's LEAST_REQUEST); ties go to the worker
that was given work the longest ago, so that equals share alike.
"""

from __future__ import annotations

from collections.abc import Iterable

from llmosd.kernel.lifecycle import State
from llmosd.kernel.worker import Worker


def choose(workers: Iterable[Worker]) -> Worker | None:
    """A ready worker with a free slot, or None."""
    able = (worker for worker in workers if worker.state is State.READY and worker.running < worker.slots)
    return min(able, key=lambda worker: (worker.running, worker.dispatched_at), default=None)

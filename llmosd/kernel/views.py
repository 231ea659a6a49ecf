"""What can be read of the kernel: frozen copies, made on request. Nothing here changes anything."""

from __future__ import annotations

import msgspec

from llmosd.kernel.ledger import Capacity, Grant
from llmosd.kernel.spec import Limits, ModelSpec
from llmosd.kernel.worker import Model, Worker


class WorkerView(msgspec.Struct, frozen=True):
    """A worker. Times are the kernel's monotonic seconds; 0: not yet."""

    name: str
    model: str
    kind: str
    driver: str
    state: str
    why: str
    incarnation: int
    pid: int
    engine_pid: int
    progress: float
    slots: int
    running: int
    queue: int
    restarts: int
    started_at: float
    ready_at: float
    state_since: float
    grant: Grant
    #: In force.
    limits: Limits
    last_exit: str


class ModelView(msgspec.Struct, frozen=True):
    spec: ModelSpec
    why: str
    queue: int
    running: int
    workers: int
    ready: int
    held: bool


class RequestView(msgspec.Struct, frozen=True):
    rid: bytes
    model: str
    worker: str
    tenant: str
    state: str
    priority: int
    attempt: int
    path: str
    stream: bool
    prompt_tokens: int
    tokens: int
    accepted_at: float
    dispatched_at: float
    first_item_at: float
    expires_at: float
    connected: bool


class LedgerView(msgspec.Struct, frozen=True):
    capacity: Capacity
    free: Capacity


def of_worker(worker: Worker, model: Model, grant: Grant | None) -> WorkerView:
    return WorkerView(
        name=worker.name,
        model=worker.model,
        kind=worker.spec.kind,
        driver=worker.spec.engine.driver,
        state=worker.state,
        why="; ".join(filter(None, (worker.why, worker.strain if worker.pid else ""))),
        incarnation=worker.incarnation,
        pid=worker.pid,
        engine_pid=worker.engine_pid,
        progress=worker.progress,
        slots=worker.slots if worker.spec.routed else 0,
        running=worker.running,
        queue=len(model.queue),
        restarts=worker.restarts,
        started_at=worker.started_at,
        ready_at=worker.ready_at,
        state_since=worker.state_since,
        grant=grant or Grant(),
        limits=worker.in_force,
        last_exit=worker.last_exit,
    )

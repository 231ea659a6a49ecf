"""The kernel's views as the control plane's messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from llmos.v1 import control_pb2 as pb
from llmosd.control.machine import Gauge, Machine
from llmosd.kernel.spec import KERNEL_LIMITS, Limits
from llmosd.kernel.units import Bytes, CpuSet
from llmosd.kernel.views import ModelView, RequestView, WorkerView

_SIMULATED = "simulated"
_SIZES = frozenset({"memory_max", "memory_high", "swap_max"})
_UP = frozenset({"starting", "loading", "adopted", "waking", "backoff", "waiting"})


def worker(view: WorkerView, machine: Machine) -> pb.Worker:
    used = machine.used(view.name)
    return pb.Worker(
        name=view.name,
        model=view.model,
        kind=view.kind,
        driver=view.driver,
        pid=view.pid,
        engine_pid=view.engine_pid,
        state=view.state,
        why=view.why,
        cpus=view.grant.millicpus / 1000,
        cpu_set=str(CpuSet(view.grant.cpus)),
        memory_reserved_bytes=view.grant.memory_bytes,
        cpu_percent=used.cpu_percent,
        memory_bytes=used.memory_bytes,
        memory_resident_bytes=used.resident_bytes,
        gpus=list(view.grant.gpus),
        gpu_memory_bytes=sum(view.grant.gpus.values()),
        slots=view.slots,
        slots_used=view.running,
        queue=view.queue,
        restarts=view.restarts,
        uptime=machine.now() - view.started_at if view.pid else 0.0,
        progress=view.progress,
        last_exit=view.last_exit,
        simulated=view.driver == _SIMULATED,
        processes=used.processes,
        threads=used.threads,
    )


def model(view: ModelView, machine: Machine, states: list[str], *, with_toml: bool) -> pb.Model:
    spec = view.spec
    file = machine.file_of(spec.model)
    toml = ""
    if with_toml and file is not None:
        try:
            toml = file.read_text()
        except OSError:
            toml = ""  # deleted behind our back: the model stays until the next reload
    return pb.Model(
        name=spec.model,
        aliases=spec.aliases,
        kind=spec.kind,
        driver=spec.engine.driver,
        routed=spec.routed,
        state=_model_state(view, states),
        why=view.why,
        workers_ready=view.ready,
        workers_running=view.workers,
        workers_max=spec.scale.max,
        workers_min=spec.scale.min,
        queue=view.queue,
        requests_running=view.running,
        slots=spec.limits.slots,
        cpus=spec.resources.cpus,
        memory_bytes=spec.resources.memory,
        gpu_memory_bytes=spec.resources.gpu_memory,
        file=str(file or ""),
        toml=toml,
        simulated=spec.engine.driver == _SIMULATED,
        requires=spec.requires,
    )


def _model_state(view: ModelView, states: list[str]) -> str:
    if view.held:
        return "stopped"
    if view.ready:
        return "ready"
    if any(state in _UP for state in states):
        return "starting"
    return "failed" if "failed" in states else "idle"


def request(view: RequestView, now: float) -> pb.Request:
    dispatched = view.dispatched_at or now
    return pb.Request(
        id=view.rid.hex(),
        model=view.model,
        worker=view.worker,
        tenant=view.tenant,
        state=view.state,
        priority=view.priority,
        attempt=view.attempt,
        path=view.path,
        stream=view.stream,
        prompt_tokens=view.prompt_tokens,
        tokens=view.tokens,
        age=now - view.accepted_at,
        waited=dispatched - view.accepted_at,
        first_item=view.first_item_at - view.accepted_at if view.first_item_at else 0.0,
        remaining=view.expires_at - now if view.expires_at else 0.0,
        connected=view.connected,
    )


def limits(
    configured: Limits, machine: Machine, view: WorkerView | None, gauges: Mapping[str, Gauge] = {}
) -> list[pb.Limit]:
    """Every limit with what is asked for, what is in force, by whom, and what of it is used."""
    rows = []
    for field in msgspec.structs.fields(Limits):
        name = field.name
        by = "llmosd" if name in KERNEL_LIMITS else machine.enforcement(name, view.name if view is not None else "")
        in_force = getattr(view.limits, name) if view is not None and view.pid else None
        rows.append(
            pb.Limit(
                name=name,
                configured=_text(getattr(configured, name)),
                in_force=_text(in_force),
                enforced_by=by,
                used=_measured(name, gauges[name].used) if name in gauges else "",
                peak=_measured(name, gauges[name].peak) if name in gauges else "",
                meaning=_meaning(field.type),
            )
        )
    return rows


def _measured(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return str(Bytes(value)) if name in _SIZES else f"{value:.0f}%" if name == "cpu_quota" else f"{value:.0f}"


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _meaning(annotation: Any) -> str:
    info = msgspec.inspect.type_info(annotation)
    extra = getattr(info, "extra_json_schema", None) or {}
    return str(extra.get("description", ""))

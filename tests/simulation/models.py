"""The models of the simulated machine: they do not all fit at once, and some require others, through an alias too."""

from __future__ import annotations

from llmosd.kernel.spec import (
    Command,
    Limits,
    Liveness,
    ModelSpec,
    Ready,
    Resources,
    Restart,
    Scale,
    Simulated,
    Timeouts,
)
from llmosd.kernel.units import Bytes, CpuSet, Seconds

GIB = 1 << 30
_URL = "http://127.0.0.1:8080/health"
_TIMES = Timeouts(start=Seconds(3), load=Seconds(5), drain=Seconds(8), stop=Seconds(2), silence=Seconds(8))


def _model(
    name: str, resources: Resources, *, slots: int, least: int = 0, most: int = 1, burst: int = 0, idle: float = 5,
    requires: tuple[str, ...] = (),
    allowed: CpuSet | None = None,
) -> ModelSpec:  # fmt: skip
    return ModelSpec(
        model=name,
        engine=Simulated(),
        aliases=(f"{name}-alias",),
        requires=requires,
        resources=resources,
        limits=Limits(slots=slots, queue_max=12, request_timeout=Seconds(0), allowed_cpus=allowed),
        scale=Scale(min=least, max=most, idle_timeout=Seconds(idle)),
        restart=Restart(delay=Seconds(0.1), delay_max=Seconds(2), burst=burst, interval=Seconds(20)),
        timeouts=_TIMES,
    )


MODELS = {
    spec.model: spec
    for spec in (
        _model("small", Resources(cpus=1), slots=2, most=2, idle=0, requires=("service",)),
        _model("kept", Resources(cpus=1), slots=1, least=1, burst=3),
        _model("large", Resources(cpus=3, memory=Bytes(6 * GIB)), slots=4, idle=0, requires=("kept",)),
        _model("own", Resources(cpus=1, cpu_placement="exclusive"), slots=2, most=2),
        _model("own-core", Resources(cpus=2, cpu_placement="exclusive"), slots=2, most=2, idle=0),
        _model("bound", Resources(), slots=2, idle=3, allowed=CpuSet((0, 4))),
        _model("gpu", Resources(gpus=2, gpu_memory=Bytes(10 * GIB)), slots=3, requires=("small-alias",)),
        _model("other-gpu", Resources(gpus=1, gpu_memory=Bytes(5 * GIB)), slots=2, most=2),
        ModelSpec(
            model="service", kind="service", engine=Command(command=("serve",)), scale=Scale(min=1),
            restart=Restart(policy="always", delay=Seconds(0.1), delay_max=Seconds(2), burst=0), timeouts=_TIMES,
        ),
        ModelSpec(
            model="asked", kind="service", engine=Command(command=("serve",)), scale=Scale(min=1),
            restart=Restart(policy="always", delay=Seconds(0.1), delay_max=Seconds(2), burst=0), timeouts=_TIMES,
            ready=Ready(http=_URL), liveness=Liveness(http=_URL),
        ),
    )
}  # fmt: skip

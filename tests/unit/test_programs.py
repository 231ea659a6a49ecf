"""What a worker is started as: the order that its grant and its limits amount to."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from llmosd.isolation import Isolator
from llmosd.kernel import effects as do
from llmosd.kernel.ledger import Grant
from llmosd.kernel.spec import Command, Limits, ModelSpec, Simulated
from llmosd.kernel.units import CpuSet, decode_quantity
from llmosd.node.confine.process import ProcessConfinement
from llmosd.node.life import Birth, Program
from llmosd.programs import Programs
from llmosd.settings import Directories, Settings
from llmosd.worker.config import HostConfig


def program(spec: ModelSpec, grant: Grant, limits: Limits) -> Program:
    here = Path("/nowhere")
    birth = Birth(b"i" * 16, b"t" * 32, "mark", here, here / "log")
    directories = Directories(here, here, here, here)
    programs = Programs(directories, Settings(), None, Isolator(directories))
    return programs.program(do.Spawn("m@1", 1, spec, limits, grant), birth, ProcessConfinement())


@pytest.mark.parametrize(
    ("grant", "allowed", "threads"),
    [
        (Grant(2000, cpus=(4, 6)), "4,6", 2),
        (Grant(2500), None, 2),
        (Grant(500), None, 1),
        (Grant(1000), "0-7", 1),
        (Grant(), "0-7", 8),
        (Grant(), None, len(os.sched_getaffinity(0))),
    ],
)
def test_an_engine_computes_with_a_thread_for_each_cpu_it_has(grant: Grant, allowed: str | None, threads: int) -> None:
    limits = Limits(allowed_cpus=CpuSet.parse(allowed) if allowed else None)
    made = program(ModelSpec(model="m", engine=Simulated()), grant, limits)
    config = msgspec.msgpack.decode(made.config, type=HostConfig, dec_hook=decode_quantity)
    assert config.threads == threads


@pytest.mark.parametrize("engine", [Simulated(), Command(command=("true",))])
def test_who_sits_on_one_numa_node_prefers_its_memory(engine: Simulated | Command) -> None:
    spec = ModelSpec(model="m", engine=engine)
    pinned = program(spec, Grant(1000, cpus=(3,), memory_node=1), Limits(allowed_cpus=CpuSet((3,)))).order
    assert (pinned.memory_node, pinned.cpu_affinity) == (1, (3,))
    assert program(spec, Grant(1000), Limits()).order.memory_node is None

"""CPUs of a worker's own, on real threads: who runs where before such a worker comes, beside it, and after it."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import pytest
from engine_models import command
from machine import Machine, wait_for

from llmos.errors import LlmosError
from llmosd.kernel.units import CpuSet
from llmosd.launch.gate import Gate, Order

#: Threads to be seen in /proc.
THREADED = """
import threading

stay = threading.Event()
for _ in range(3):
    threading.Thread(target=stay.wait, daemon=True).start()


async def generate(request):
    yield "done"
"""
ALL = sorted(os.sched_getaffinity(0))
needs_two = pytest.mark.skipif(len(ALL) < 2, reason="one CPU must stay shared: this needs two")


def prepare(machine: Machine) -> None:
    engine = machine.root / "threaded.py"
    engine.write_text(THREADED)
    threaded = f'[engine]\ndriver = "python"\nfunction = "{engine}:generate"\n'
    machine.model(f'model = "shares"\n{threaded}')
    machine.model(f'model = "own"\n{threaded}[resources]\ncpus = 1\ncpu_placement = "exclusive"\n')
    machine.start()


def start(machine: Machine, model: str) -> int:
    """Bring a model's worker up; returns its pid."""
    client = machine.client
    return client.wait(client.start(model).workers)[0].pid


def cpus_of(pid: int) -> set[int]:
    """The CPUs that any thread of a process may run on; they must be the same for all."""
    found = {frozenset(os.sched_getaffinity(int(task.name))) for task in Path(f"/proc/{pid}/task").iterdir()}
    return set(next(iter(found))) if len(found) == 1 else set()


def wait_cpus(pid: int, cpus: set[int]) -> None:
    wait_for(f"{cpus} on every thread of {pid}", lambda: cpus_of(pid) == cpus)


@needs_two
def test_a_worker_with_a_cpu_of_its_own_is_alone_there_from_its_start_to_its_end(a_machine: Machine) -> None:
    prepare(a_machine)
    shares = start(a_machine, "shares")
    assert cpus_of(shares) == set(ALL)
    assert len(list(Path(f"/proc/{shares}/task").iterdir())) >= 4
    own = start(a_machine, "own")
    (mine,) = cpus_of(own)
    wait_cpus(shares, set(ALL) - {mine})
    # Shown as it is.
    worker = a_machine.worker("own@1")
    assert (worker.cpus, worker.cpu_set) == (1, str(mine))
    header, *rows = a_machine.llmos("ps", "own", "-o", "wide").stdout.splitlines()
    assert rows[0][header.index("OWN CPUS") :].split()[0] == str(mine)
    (cpus,) = [device for device in a_machine.client.devices().devices if device.kind == "cpu"]
    assert cpus.properties["exclusive:own@1"] == str(mine)
    for name, in_force in (("own@1", {mine}), ("shares@1", set(ALL) - {mine})):
        (limits,) = json.loads(a_machine.llmos("limits", name, "-o", "json").stdout)
        (row,) = [limit for limit in limits["limits"] if limit["name"] == "allowed_cpus"]
        assert (row["configured"], row["in_force"]) == ("", str(CpuSet(in_force)))
    # The daemon's death changes nothing, and the next one knows whose they are.
    a_machine.kill()
    a_machine.start()
    a_machine.client.wait(["own@1", "shares@1"])
    assert (a_machine.worker("own@1").pid, a_machine.worker("shares@1").pid) == (own, shares)
    assert a_machine.worker("own@1").cpu_set == str(mine)
    assert (cpus_of(own), cpus_of(shares)) == ({mine}, set(ALL) - {mine})
    # It leaves, and everybody has all again.
    a_machine.client.stop("own")
    wait_cpus(shares, set(ALL))
    a_machine.kill()
    a_machine.start()
    a_machine.client.wait(["shares@1"])
    assert cpus_of(shares) == set(ALL)


@needs_two
def test_the_last_shared_cpu_is_refused_with_the_reason(a_machine: Machine) -> None:
    a_machine.model(
        command(["sleep", "1000"], name="all", rest=f'[resources]\ncpus = {len(ALL)}\ncpu_placement = "exclusive"\n')
    )
    a_machine.start()
    with pytest.raises(LlmosError, match="and one CPU always stays shared"):
        a_machine.client.start("all")


@pytest.mark.skipif(not Path("/proc/self/numa_maps").exists(), reason="the kernel is built without NUMA")
@pytest.mark.parametrize(("node", "policy"), [(None, "default"), (0, "prefer:0"), (1023, "default")])
def test_a_child_prefers_the_memory_of_its_node_and_starts_without_where_there_is_none(
    tmp_path: Path, node: int | None, policy: str
) -> None:
    shown = tmp_path / "numa_maps"
    out, null = os.open(shown, os.O_WRONLY | os.O_CREAT), os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    gate = Gate.spawn(stdin=null, stdout=out, stderr=null)
    asyncio.run(gate.go(Order(argv=("cat", "/proc/self/numa_maps"), env=dict(os.environ), memory_node=node)))
    assert os.waitpid(gate.pid, 0)[1] == 0
    for fd in (out, null, gate.pidfd):
        os.close(fd)
    assert {line.split()[1] for line in shown.read_text().splitlines()} == {policy}

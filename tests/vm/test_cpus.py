"""CPUs of a worker's own on a machine with two NUMA nodes, 0-1 and 2-3, as `taskset` and /proc show them.

The simulated model may run on 2-3 only, so that one of these always stays shared.
"""

from __future__ import annotations

import pytest
from service import MODELS, Service

from llmosd.kernel.units import CpuSet

#: The CPUs of each thread of a process, as the kernel writes them.
ALLOWED = "sed --silent 's/^Cpus_allowed_list:\\t//p' /proc/{}/task/*/status | sort --unique"

pytestmark = pytest.mark.timeout(600)  # emulated, and the first test boots the machine


def model(name: str, cpus: int, limits: str = "") -> str:
    return f"""
model = "{name}"
[engine]
driver = "simulated"
[resources]
cpus = {cpus}
cpu_placement = "exclusive"
[limits]
{limits}
"""


@pytest.fixture(scope="module", autouse=True)
def models(installed: Service) -> None:
    installed.run("systemctl start llmosd.service")
    for name, cpus, limits in (("pair", 2, ""), ("one", 1, ""), ("first", 1, 'allowed_cpus = "0"')):
        installed.guest.write(f"{MODELS}/{name}.toml", model(name, cpus, limits))
    installed.llmos("reload")


def cpus_of(service: Service, pid: int) -> str:
    """The CPUs of every thread of a process; they must be the same for all."""
    mask = service.guest.out(f"taskset --all-tasks --pid {pid} | sed 's/.*: //' | sort --unique")
    status = service.guest.out(ALLOWED.format(pid))
    assert CpuSet.parse(status) == CpuSet(cpu for cpu in range(4) if int(mask, 16) >> cpu & 1)
    return status


def wait_cpus(service: Service, pid: int, cpus: str) -> None:
    service.guest.wait(f"CPUs {cpus} on every thread of {pid}", f'[ "$({ALLOWED.format(pid)})" = "{cpus}" ]')
    assert cpus_of(service, pid) == cpus


def memory_policy(service: Service, pid: int) -> set[str]:
    return set(service.guest.out(f"cut --delimiter=' ' --fields=2 /proc/{pid}/numa_maps | sort --unique").splitlines())


def own_cpus(service: Service) -> dict[str, str]:
    return {worker["model"]: worker["cpu_set"] for worker in service.json("ps")}


def test_two_workers_with_cpus_of_their_own_are_alone_there_and_prefer_the_memory_beside(service: Service) -> None:
    service.llmos("start", "pair")
    service.llmos("start", "one")
    assert own_cpus(service) == {"gateway": "", "sim": "", "pair": "0-1", "one": "2"}
    pids = service.workers()
    assert cpus_of(service, pids["pair"]) == "0-1"
    assert cpus_of(service, pids["one"]) == "2"
    for shares in ("sim", "gateway"):
        wait_cpus(service, pids[shares], "3")
    assert memory_policy(service, pids["pair"]) == {"prefer:0"}
    assert memory_policy(service, pids["one"]) == {"prefer:1"}
    assert memory_policy(service, pids["sim"]) == {"default"}
    # Also after the daemon's death.
    daemon = service.main_pid()
    service.run(f"kill -KILL {daemon}")
    service.wait_replaced(daemon)
    assert service.workers() == pids
    assert own_cpus(service) == {"gateway": "", "sim": "", "pair": "0-1", "one": "2"}
    assert [cpus_of(service, pids[name]) for name in ("pair", "one", "sim", "gateway")] == ["0-1", "2", "3", "3"]
    service.llmos("stop", "one")
    wait_cpus(service, pids["gateway"], "2-3")
    service.llmos("stop", "pair")
    wait_cpus(service, pids["gateway"], "0-3")
    wait_cpus(service, pids["sim"], "2-3")


def test_a_worker_split_over_two_nodes_moves_together_when_another_leaves(service: Service) -> None:
    service.llmos("start", "first")
    service.llmos("start", "pair")
    pids = service.workers()
    # 2-3 would be one node, but then nothing of it were left for sim.
    assert own_cpus(service) == {"gateway": "", "sim": "", "first": "0", "pair": "1,3"}
    assert cpus_of(service, pids["pair"]) == "1,3"
    assert memory_policy(service, pids["pair"]) == {"default"}
    wait_cpus(service, pids["sim"], "2")
    service.llmos("stop", "first")
    wait_cpus(service, pids["pair"], "0-1")
    wait_cpus(service, pids["sim"], "2-3")
    assert own_cpus(service)["pair"] == "0-1"
    assert "CPUs 0-1 instead of 1,3" in service.llmos("events")
    service.llmos("stop", "pair")

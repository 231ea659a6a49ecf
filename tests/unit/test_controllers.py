"""What limits become for cgroups and for systemd, and what a group's counters mean for its worker."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmosd.kernel.spec import Limits
from llmosd.kernel.units import Bytes, CpuSet, Percent
from llmosd.node import counters
from llmosd.node.cgroups import KNOBS, CgroupGroup
from llmosd.node.confine import Unenforceable
from llmosd.node.confine.controllers import ControllerConfinement
from llmosd.node.confine.process import ProcessConfinement
from llmosd.node.counters import Counters
from llmosd.node.devices import usable_cpus
from llmosd.node.scopes import PROPERTIES, properties_of, unit_name
from llmosd.node.strain import Strain, may_strain
from llmosd.node.usage import Usage

ALL = Limits(
    allowed_cpus=CpuSet([0, 3, 9]),
    cpu_weight=50,
    cpu_quota=Percent(150),
    memory_high=Bytes(200),
    memory_max=Bytes(300),
    swap_max=Bytes(0),
    tasks_max=7,
    io_weight=20,
)


@pytest.fixture
def group(tmp_path: Path) -> CgroupGroup:
    """A group over a directory that only looks like a cgroup."""
    return CgroupGroup(tmp_path, Limits(), frozenset(KNOBS))


def values(path: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in path.iterdir()}


def test_each_limit_is_written_as_the_kernel_wants_it_and_lifted_again(group: CgroupGroup, tmp_path: Path) -> None:
    assert group.limit(ALL, Limits()) == []
    assert values(tmp_path) == {
        "cpuset.cpus": "0,3,9", "cpu.weight": "50", "cpu.max": "150000 100000", "memory.high": "200",
        "memory.max": "300", "memory.swap.max": "0", "pids.max": "7", "io.weight": "default 20",
    }  # fmt: skip
    assert group.limit(Limits(), ALL) == []
    assert values(tmp_path) == {
        "cpuset.cpus": str(usable_cpus()), "cpu.weight": "100", "cpu.max": "max", "memory.high": "max",
        "memory.max": "max", "memory.swap.max": "max", "pids.max": "max", "io.weight": "default 100",
    }  # fmt: skip


def test_only_what_differs_is_written(group: CgroupGroup, tmp_path: Path) -> None:
    group.limit(Limits(cpu_weight=50, tasks_max=8), Limits(cpu_weight=50, tasks_max=7))
    assert values(tmp_path) == {"pids.max": "8"}


def test_a_limit_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    gone = CgroupGroup(tmp_path / "gone", Limits(), frozenset(KNOBS))
    (failed,) = gone.limit(Limits(memory_max=Bytes(1)), Limits())
    assert failed == "memory_max could not be changed (memory.max: No such file or directory)"


def test_each_limit_becomes_systemds_property_of_the_same_name() -> None:
    found = {name: (value.signature, value.value) for name, value in properties_of(ALL, set(PROPERTIES)).items()}
    assert found == {
        "AllowedCPUs": ("ay", b"\x09\x02"),
        "CPUWeight": ("t", 50),
        "CPUQuotaPerSecUSec": ("t", 1_500_000),
        "MemoryHigh": ("t", 200),
        "MemoryMax": ("t", 300),
        "MemorySwapMax": ("t", 0),
        "TasksMax": ("t", 7),
        "IOWeight": ("t", 20),
    }
    lifted = properties_of(Limits(), {"memory_max", "allowed_cpus"})
    all_of_them = sum(1 << cpu for cpu in usable_cpus())
    assert lifted["MemoryMax"].value == 2**64 - 1
    assert int.from_bytes(lifted["AllowedCPUs"].value, "little") == all_of_them
    assert set(PROPERTIES) == set(KNOBS)


def test_a_workers_scope_is_no_instance_of_a_template() -> None:
    assert unit_name("gemma3-270m@1", 17) == "llmos-gemma3-270m:1-17.scope"


def test_what_no_controller_holds_is_left_to_the_process_maker() -> None:
    held = frozenset({"memory_max", "cpu_quota"})
    maker = ControllerConfinement("cgroup", held, ProcessConfinement(CpuSet([0, 1])))
    assert [maker.enforcement(name) for name in ("memory_max", "tasks_max", "nice", "slots", "swap_max")] == [
        "cgroup", "watched", "process", "llmosd", "",
    ]  # fmt: skip
    maker.check(Limits(memory_max=Bytes(1), cpu_quota=Percent(1)))
    with pytest.raises(Unenforceable, match="swap_max needs"):
        maker.check(Limits(swap_max=Bytes(0)))
    with pytest.raises(Unenforceable, match="names CPUs 7"):
        maker.check(Limits(allowed_cpus=CpuSet([7])))
    # The kernel of the machine kills what is over: nobody needs to look.
    assert maker.over_limit(Limits(memory_max=Bytes(1)), Usage(memory_bytes=2)) == ""
    assert "tasks_max is 1" in maker.over_limit(Limits(tasks_max=1), Usage(threads=2))


def test_counters_are_read_from_the_files_that_are_there(tmp_path: Path) -> None:
    assert counters.read(tmp_path / "gone") == Counters()
    for name, text in {
        "cpu.stat": "usage_usec 2500000\nuser_usec 1\nnr_throttled 4\nthrottled_usec 1500000\n",
        "memory.events": "low 0\nhigh 3\nmax 9\noom 1\noom_kill 2\noom_group_kill 0\n",
        "memory.current": "4096\n",
        "memory.peak": "8192\n",
        "memory.pressure": "some avg10=12.50 avg60=1.00 avg300=0.00 total=7\nfull avg10=0.00 avg60=0.00 total=0\n",
        "pids.current": "3\n",
    }.items():
        (tmp_path / name).write_text(text)
    assert counters.read(tmp_path) == Counters(
        cpu_s=2.5, throttled_s=1.5, memory_bytes=4096, memory_peak_bytes=8192, tasks=3, over_high=3, oom_kills=2,
        stalled={"memory": 0.125},
    )  # fmt: skip


def test_what_holds_a_worker_back_is_said_while_it_does() -> None:
    limits = Limits(cpu_quota=Percent(50), memory_high=Bytes(1 << 20), memory_max=Bytes(2 << 20))
    strain = Strain()
    assert not strain.update(Counters(throttled_s=100.0, over_high=5), limits, 10.0), "what was before is not now"
    assert strain.update(Counters(throttled_s=101.0, over_high=5), limits, 12.0)
    assert strain.why == "throttled by cpu_quota, which is 50%"
    assert not strain.update(Counters(throttled_s=102.0, over_high=5), limits, 14.0), "nothing new"
    assert strain.update(Counters(throttled_s=102.0, over_high=6, oom_kills=2), limits, 16.0)
    assert strain.why == (
        "slowed down to give memory back: above memory_high, which is 1M; "
        "out of memory: 2 processes were killed by the OOM killer; memory_max is 2M"
    )
    assert strain.oom_kills == 2
    assert strain.update(Counters(throttled_s=102.1, over_high=6, oom_kills=2), limits, 18.0)
    assert strain.why == ""
    assert strain.update(Counters(stalled={"memory": 0.5, "cpu": 0.9}), limits, 20.0)
    assert strain.why == "stalled for want of memory 50% of the time"


def test_only_limits_that_can_hold_a_worker_back_are_worth_a_look() -> None:
    assert not may_strain(Limits(slots=1, nice=3))
    assert may_strain(Limits(memory_max=Bytes(1)))

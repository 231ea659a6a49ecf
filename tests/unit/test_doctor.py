"""The doctor, on this machine and on facts of other machines."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from llmosd.node.confine.process import ProcessConfinement
from llmosd.node.devices import take_inventory
from llmosd.node.doctor import Check, Facts, diagnose, look
from llmosd.node.gpu import GpuDevice, Gpus

G = 1 << 30


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Facts:
    return look(take_inventory(), ProcessConfinement(), tmp_path_factory.mktemp("run"))


def check(facts: Facts, name: str, **changes: object) -> Check:
    (found,) = (check for check in diagnose(msgspec.structs.replace(facts, **changes)) if check.name == name)
    return found


def test_every_check_that_is_not_ok_says_what_to_do(here: Facts) -> None:
    checks = diagnose(here)
    assert len({check.name for check in checks}) == len(checks)
    for one in checks:
        assert one.message
        assert bool(one.advice) == (one.result != "ok"), one


def test_a_bare_machine_gets_advice_for_everything_it_lacks(here: Facts) -> None:
    bare = msgspec.structs.replace(
        here,
        systemd_booted=False, kernel=(5, 4), cgroup_layout="none", cgroup_directory="", cgroup_writable=False,
        cgroup_controllers=frozenset(), open_files=(1024, 1024), uid=1000, least_nice=0, llamacpp_wheel=False,
        llama_server="", runtime_directory_trouble="/run is not writable for us", pressure=False,
        inventory=msgspec.structs.replace(here.inventory, numa_nodes=(), gpus=Gpus()),
    )  # fmt: skip
    by_result = {check.name: check.result for check in diagnose(bare) if check.result != "ok"}
    assert by_result.pop("memory", "limited") == "limited"  # this machine's own cgroup may be bounded
    assert by_result == {
        "systemd": "missing",
        "cgroup v2": "missing",
        "cgroup.kill and freezer": "missing",
        "memory controller": "missing",
        "cpu controller": "missing",
        "limits": "limited",
        "exit status": "limited",
        "GPU": "missing",
        "NUMA": "missing",
        "open files": "limited",
        "privileges": "limited",
        "llama.cpp": "missing",
        "runtime directory": "missing",
        "pressure (PSI)": "missing",
    }
    assert all(check.advice for check in diagnose(bare) if check.result != "ok")


def test_systemd_that_is_there_and_not_used_is_told_from_one_that_is(here: Facts) -> None:
    assert check(here, "systemd", systemd_booted=True, maker="systemd").result == "ok"
    unused = check(here, "systemd", systemd_booted=True, maker="process")
    assert (unused.result, "llmosd[systemd]" in unused.advice) == ("limited", True)


def test_a_delegated_cgroup_v2_tree_is_ok_and_a_read_only_one_is_limited(here: Facts) -> None:
    delegated: dict[str, object] = {
        "cgroup_layout": "unified", "cgroup_directory": "/sys/fs/cgroup/a", "cgroup_writable": True,
        "cgroup_controllers": frozenset({"cpu", "memory", "pids"}), "kernel": (6, 8),
    }  # fmt: skip
    for name in ("cgroup v2", "cgroup.kill and freezer", "memory controller", "cpu controller"):
        assert check(here, name, **delegated).result == "ok"
    read_only = {**delegated, "cgroup_writable": False}
    assert check(here, "cgroup v2", **read_only).result == "limited"
    assert "Delegate=yes" in check(here, "memory controller", **read_only).advice


def test_a_hybrid_machine_is_told_how_to_become_unified(here: Facts) -> None:
    hybrid = check(here, "cgroup v2", cgroup_layout="hybrid", cgroup_directory="/sys/fs/cgroup/unified",
                   cgroup_writable=True)  # fmt: skip
    assert hybrid.result == "limited"
    assert "unified_cgroup_hierarchy=1" in hybrid.advice


@pytest.mark.parametrize(
    ("mounts", "layout"),
    [
        ("cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n", "unified"),
        ("cgroup /c/cpu cgroup rw,cpu 0 0\ncgroup2 /c/unified cgroup2 rw 0 0\n", "hybrid"),
        ("cgroup /c/cpu cgroup rw,cpu 0 0\n", "v1"),
        ("proc /proc proc rw 0 0\n", "none"),
    ],
)
def test_the_cgroup_layout_is_read_from_the_mounts(here: Facts, tmp_path: Path, mounts: str, layout: str) -> None:
    path = tmp_path / "proc/self/mounts"
    path.parent.mkdir(parents=True)
    path.write_text(mounts)
    assert look(here.inventory, ProcessConfinement(), tmp_path, root=tmp_path).cgroup_layout == layout


def test_the_limits_check_names_who_enforces_what_and_what_is_refused(here: Facts) -> None:
    found = check(here, "limits")
    assert "watched: memory_max, tasks_max" in found.message
    assert "gpu_memory_max" in found.message.split("refused:")[1]


def test_gpus_are_named_with_their_memory_and_trouble_is_told(here: Facts) -> None:
    gpus = Gpus("580.1", (GpuDevice("GPU-a", "Model A", "", 80 * G, 0),))
    inventory = msgspec.structs.replace(here.inventory, gpus=gpus)
    assert check(here, "GPU", inventory=inventory) == Check("GPU", "ok", "Model A (80G), driver 580.1")
    ailing = msgspec.structs.replace(here.inventory, gpus=msgspec.structs.replace(gpus, notes=("NVML: GPU is lost",)))
    assert check(here, "GPU", inventory=ailing).result == "limited"


def test_memory_that_a_container_bounds_is_limited(here: Facts) -> None:
    bounded = msgspec.structs.replace(here.inventory, memory_bytes=2 * G, machine_memory_bytes=8 * G)
    found = check(here, "memory", inventory=bounded)
    assert found.result == "limited"
    assert "the machine has 8G" in found.message


def test_a_soft_limit_on_open_files_can_be_raised_up_to_the_hard_one(here: Facts) -> None:
    assert "ulimit -n" in check(here, "open files", open_files=(1024, 1 << 20)).advice
    assert "limits.conf" in check(here, "open files", open_files=(1024, 4096)).advice
    assert check(here, "open files", open_files=(-1, -1)).result == "ok"


def test_a_runtime_directory_that_is_too_long_for_sockets_is_refused(here: Facts) -> None:
    assert check(here, "runtime directory", runtime_directory="/run/" + "x" * 120).result == "missing"


def test_a_runtime_directory_under_a_file_cannot_be_used(here: Facts, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    facts = look(here.inventory, ProcessConfinement(), tmp_path / "file" / "llmosd")
    assert check(facts, "runtime directory").result == "missing"
    assert "is not a directory" in check(facts, "runtime directory").message


def test_looking_leaves_no_trace(here: Facts, tmp_path: Path) -> None:
    look(here.inventory, ProcessConfinement(), tmp_path / "llmosd")
    assert list(tmp_path.iterdir()) == []

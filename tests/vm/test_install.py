"""What the units make of a machine, and what the daemon finds there."""

from __future__ import annotations

import pytest
from service import MODELS, Service

pytestmark = pytest.mark.timeout(600)  # emulated, and the first test boots the machine


def test_systemd_accepts_the_installed_units_and_none_failed(service: Service) -> None:
    found = service.run("systemd-analyze --man=no verify /etc/systemd/system/llmos*")
    assert found.stdout + found.stderr == ""
    assert service.guest.out("systemctl is-system-running") == "running"


def test_members_of_the_group_may_use_the_daemon_and_nobody_else(service: Service) -> None:
    assert service.guest.out("stat --format='%A %U %G' /run/llmosd") == "drwxr-x--- root llmos"
    ordinary = "setpriv --reuid=nobody --regid=nogroup"
    assert service.run(f"{ordinary} --groups=llmos llmos run sim one").stdout
    refused = service.run(f"{ordinary} --clear-groups llmos run sim one", check=False)
    assert refused.status != 0
    assert "/run/llmosd may not be read by you" in refused.stderr


def test_the_doctor_finds_systemd_the_whole_of_cgroup_v2_and_both_numa_nodes(service: Service) -> None:
    checks = {check["name"]: check for check in service.json("doctor")}
    for name in ("systemd", "cgroup v2", "cgroup.kill and freezer", "memory controller", "cpu controller",
                 "privileges", "pressure (PSI)"):  # fmt: skip
        assert checks[name]["result"] == "ok", checks[name]
    assert "controllers: cpu cpuset io memory pids" in checks["cgroup v2"]["message"]
    assert checks["NUMA"]["message"] == "node 0: CPUs 0-1; node 1: CPUs 2-3"


def test_devices_are_counted_once_and_by_numa_node(service: Service) -> None:
    devices = service.json("devices")["devices"]
    (cpus,) = (device for device in devices if device["kind"] == "cpu")
    assert cpus["total"] == 4
    assert cpus["properties"] == {"packages": "2", "cores": "4", "threads": "4"}
    nodes = {device["id"]: device for device in devices if device["kind"] == "node"}
    assert {id_: node["name"][-8:] for id_, node in nodes.items()} == {"node0": "CPUs 0-1", "node1": "CPUs 2-3"}
    assert all(0.8 * 2**30 < node["total"] < 1.1 * 2**30 for node in nodes.values())


def test_a_worker_stays_on_the_cpus_of_its_node(service: Service) -> None:
    service.llmos("run", "sim", "one")
    pid = service.workers()["sim"]
    threads = service.guest.out(f"grep --no-filename ^Cpus_allowed_list: /proc/{pid}/task/*/status").splitlines()
    assert {line.split()[1] for line in threads} == {"2-3"}


def test_a_reload_takes_the_good_model_file_and_says_what_is_wrong_with_the_bad_one(service: Service) -> None:
    service.guest.write(f"{MODELS}/good.toml", 'model = "good"\n[engine]\ndriver = "simulated"\n')
    service.guest.write(f"{MODELS}/bad.toml", 'model = "bad"\n[engine]\ndriver = "no such"\n')
    daemon = service.main_pid()
    try:
        service.run("systemctl reload llmosd")
        refused = "journalctl --boot --unit=llmosd --priority=err --grep='refused.*bad.toml' --quiet >/dev/null"
        service.guest.wait("refusal in the journal", refused)
        assert service.llmos("run", "good", "one")
        assert service.main_pid() == daemon
    finally:
        service.run(f"rm {MODELS}/good.toml {MODELS}/bad.toml && systemctl reload llmosd")

"""The daemon replaced in place under systemd; and the maker that needs no systemd, where all controllers are."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from typing import Final

import pytest
from service import SIMULATED, SOCKETS, UNIT, Service

pytestmark = pytest.mark.timeout(600)  # emulated, and the first test boots the machine

BODY: Final = json.dumps({"model": "sim", "prompt": "one two", "max_tokens": 400, "stream": True})
STREAM: Final = f"curl --silent --show-error --fail --no-buffer --json '{BODY}' http://127.0.0.1:8484/v1/completions"
OTHER: Final = "/tmp/other"


def test_an_upgrade_keeps_the_main_process_the_workers_the_sockets_and_a_stream(service: Service) -> None:
    service.llmos("run", "sim", "one")
    service.llmos("start", "stubborn")
    before, daemon = service.workers(), service.main_pid()
    # In the background: two seconds of stream, with the upgrade in the middle of it.
    service.run(f"({STREAM} >/tmp/stream 2>/tmp/stream.errors; echo $? >/tmp/stream.status) </dev/null &")
    service.guest.wait("stream under way", "[ $(grep -c ^data: /tmp/stream) -gt 5 ]")
    said = service.llmos("upgrade")
    assert f"pid {daemon}, serves again after" in said
    assert (service.main_pid(), service.workers()) == (daemon, before)
    assert service.property("ActiveState") == "active"
    assert service.property("NRestarts") == "0"
    service.guest.wait("end of the stream", "[ -s /tmp/stream.status ]")
    assert service.guest.out("cat /tmp/stream.status /tmp/stream.errors") == "0"
    # Each token once, as in a stream that nobody disturbed.
    service.run(f"{STREAM} >/tmp/undisturbed")
    text = 'grep --only-matching --extended-regexp \'"text":"[^"]*"\''
    service.run(f"diff <({text} /tmp/stream) <({text} /tmp/undisturbed)")
    assert {service.property("ActiveState", name) for name in SOCKETS} == {"active"}
    service.llmos("stop", "stubborn")
    service.run(f"systemctl reload {UNIT}")  # systemd and the new program understand each other
    assert service.main_pid() == daemon


@pytest.fixture
def other(service: Service) -> Iterator[str]:
    """A second daemon, in a cgroup of its own and without systemd's help; the command that asks it."""
    service.guest.write(f"{OTHER}/etc/llmosd.toml", '[gateway]\nenabled = false\n[node]\nconfinement = "cgroup"\n')
    service.guest.write(f"{OTHER}/etc/models.d/sim.toml", SIMULATED)
    start = (
        f"systemd-run --quiet --unit=other --property=Delegate=yes --property=KillMode=process llmosd --root {OTHER}"
    )
    service.run(start)
    try:
        yield f"llmos --host {OTHER}/run"
    finally:
        service.run("systemctl stop other", check=False)


def test_a_cgroup_of_its_own_with_all_controllers_holds_workers_as_systemd_does(service: Service, other: str) -> None:
    service.guest.wait("worker", f"{other} ps sim | grep -q ready")
    assert json.loads(service.guest.out(f"{other} status --output=json"))["confinement"] == "cgroup"
    (worker,) = json.loads(service.guest.out(f"{other} ps sim --output=json"))
    group = "/sys/fs/cgroup" + service.guest.out(f"grep ^0:: /proc/{worker['pid']}/cgroup").removeprefix("0::")
    assert group.startswith("/sys/fs/cgroup/system.slice/other.service/llmosd-")
    changes = ["memory_max=300M", "cpu_weight=50", "cpu_quota=150%", "tasks_max=77", "allowed_cpus=2"]
    service.run(f"{other} limits sim {shlex.join(changes)}")
    (shown,) = json.loads(service.guest.out(f"{other} limits sim --output=json"))
    by = {limit["name"]: limit["enforced_by"] for limit in shown["limits"]}
    for name in ("memory_max", "memory_high", "swap_max", "cpu_weight", "cpu_quota", "tasks_max", "allowed_cpus"):
        assert by[name] == "cgroup", by
    files = "memory.max cpu.weight cpu.max pids.max cpuset.cpus.effective"
    values = service.guest.out(f"cd {group} && cat {files}").splitlines()
    assert values == [str(300 << 20), "50", "150000 100000", "77", "2"]
    # The daemon is in a leaf of its own beside its workers.
    daemon = service.property("MainPID", "other")
    assert service.guest.out(f"grep ^0:: /proc/{daemon}/cgroup").endswith("/daemon")
    # Upgraded, it knows the place that it moved itself into.
    service.run(f"{other} upgrade")
    service.run(f"{other} limits sim tasks_max=66")
    assert service.guest.out(f"cat {group}/pids.max") == "66"
    assert json.loads(service.guest.out(f"{other} ps sim --output=json"))[0]["pid"] == worker["pid"]

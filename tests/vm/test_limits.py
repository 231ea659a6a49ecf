"""Limits by systemd: scopes in llmos.slice, memory that kills one worker alone, a quota that spares the neighbours."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import pytest
from service import MODELS, UNIT, Service

pytestmark = pytest.mark.timeout(600)  # emulated, and the first test boots the machine

#: An engine of one's own: it serves, and a request makes it take more memory than it may have.
ENGINE = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def do_POST(self):
        hoard = [bytearray(1 << 20) for _ in range(400)]
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
GREEDY = """
model = "greedy"
[engine]
driver = "openai"
command = ["python3", "/opt/greedy.py", "{port}"]
[limits]
memory_max = "150M"
[restart]
policy = "no"
"""
HOG = """
model = "hog"
kind = "service"
[engine]
driver = "command"
command = ["python3", "-c", "import time; b = bytearray(300 << 20); time.sleep(1000)"]
[limits]
memory_max = "64M"
[restart]
policy = "no"
"""
BUSY = """
model = "{name}"
kind = "service"
[engine]
driver = "command"
command = ["python3", "-c", "while True: pass"]
[limits]
allowed_cpus = "3"
"""


@contextlib.contextmanager
def models(service: Service, **texts: str) -> Iterator[None]:
    """Have model files for a while."""
    for name, text in texts.items():
        service.guest.write(f"{MODELS}/{name}.toml", text)
    service.llmos("reload")
    try:
        yield
    finally:
        service.run(f"cd {MODELS} && rm -f {' '.join(f'{name}.toml' for name in texts)}")
        service.llmos("reload")


def scope(service: Service, pid: int) -> str:
    """The unit of a process."""
    return service.guest.out(f"grep ^0:: /proc/{pid}/cgroup").rpartition("/")[2]


def limits(service: Service, name: str) -> dict[str, dict[str, str]]:
    (worker,) = service.json("limits", name)
    return {limit["name"]: limit for limit in worker["limits"]}


def test_each_worker_is_a_scope_in_the_slice_and_systemctl_shows_it(service: Service) -> None:
    service.llmos("run", "sim", "one")
    assert service.json("status")["confinement"] == "systemd"
    pid = service.workers()["sim"]
    unit = scope(service, pid)
    assert re.fullmatch(r"llmos-sim:1-\d+\.scope", unit)
    assert service.property("Slice", unit) == "llmos.slice"
    assert service.property("Description", unit) == "llmosd worker sim@1"
    assert service.property("ActiveState", unit) == "active"
    shown = service.guest.out("systemctl status llmos.slice --no-pager --lines=0")
    assert "llmos-log-writer-" in shown
    assert unit in shown and str(pid) in shown
    assert service.property("TasksMax", unit) == "infinity"


def test_limits_are_systemds_properties_and_change_live(service: Service) -> None:
    service.llmos("run", "sim", "one")
    pid = service.workers()["sim"]
    unit, group = scope(service, pid), f"/sys/fs/cgroup/llmos.slice/{scope(service, pid)}"
    service.llmos(
        "limits", "sim", "memory_max=300M", "memory_high=200M", "cpu_weight=50", "cpu_quota=150%", "tasks_max=77",
        "swap_max=10M", "allowed_cpus=2",
    )  # fmt: skip
    try:
        shown = limits(service, "sim")
        for name in ("memory_max", "memory_high", "cpu_weight", "cpu_quota", "tasks_max", "swap_max", "allowed_cpus"):
            assert shown[name]["enforced_by"] == "systemd", shown[name]
            assert shown[name]["configured"] == shown[name]["in_force"] != ""
        assert shown["memory_max"]["used"].endswith("M") and shown["memory_max"]["peak"].endswith("M")
        for _ in range(2):
            files = "memory.max memory.high cpu.weight cpu.max pids.max memory.swap.max cpuset.cpus.effective"
            values = service.guest.out(f"cd {group} && cat {files}").splitlines()
            assert values == [str(300 << 20), str(200 << 20), "50", "150000 100000", "77", str(10 << 20), "2"]
            assert service.guest.out(f"taskset -p --cpu-list {pid}").endswith(": 2")
            service.run("systemctl daemon-reload")  # systemd writes all that it knows of again
        assert service.property("MemoryMax", unit) == str(300 << 20)
        # What is lifted is lifted.
        names = ("memory_max", "memory_high", "cpu_weight", "cpu_quota", "tasks_max", "swap_max")
        service.llmos("limits", "sim", *(f"{name}=" for name in names))
        for name in ("MemoryMax", "MemoryHigh", "MemorySwapMax", "CPUQuotaPerSecUSec", "TasksMax"):
            assert service.property(name, unit) == "infinity", name
        assert service.property("CPUWeight", unit) == "[not set]"
        values = service.guest.out(f"cd {group} && cat memory.max memory.high memory.swap.max pids.max")
        assert values.split() == ["max"] * 4
        assert service.workers()["sim"] == pid
    finally:
        service.llmos("limits", "sim", "allowed_cpus=2-3")


def test_a_worker_over_memory_max_is_killed_alone_and_ps_says_why(service: Service) -> None:
    service.llmos("run", "sim", "one")
    before = service.workers()
    with models(service, hog=HOG):
        service.run("llmos start hog", check=False)
        service.guest.wait("end of the worker", "llmos ps -a hog --output=json | grep -q '\"failed\"'")
        (hog,) = service.json("ps", "--all", "hog")
        assert hog["why"] == "out of memory: a process was killed by the OOM killer; memory_max is 64M"
        assert hog["last_exit"].startswith("killed by signal 9: out of memory")
        assert "out of memory" in service.llmos("ps", "--all")
        assert "out of memory" in service.llmos("events")
        assert service.workers() == before


def test_an_engine_over_memory_max_is_killed_and_its_host_lives_to_say_so(service: Service) -> None:
    service.llmos("run", "sim", "one")
    before = service.workers()
    service.guest.write("/opt/greedy.py", ENGINE)
    with models(service, greedy=GREEDY):
        service.llmos("start", "greedy")
        refused = service.run("llmos run greedy one", check=False)
        assert refused.status == 1
        assert "was killed by the OOM killer" in refused.stderr, refused.stderr
        service.guest.wait("end of the worker", "llmos ps -a greedy --output=json | grep -q '\"failed\"'")
        (greedy,) = service.json("ps", "--all", "greedy")
        assert "the engine was killed by the OOM killer: it ran out of memory" in greedy["why"]
        assert service.workers() == before


def test_a_neighbour_keeps_its_speed_while_a_busy_worker_is_throttled(service: Service) -> None:
    texts = {name: BUSY.format(name=name) for name in ("busy", "neighbour")}
    with models(service, **texts):
        service.llmos("start", "neighbour")
        alone = share(service, service.workers()["neighbour"])
        service.llmos("start", "busy")
        both = share(service, service.workers()["neighbour"])
        service.llmos("limits", "busy", "cpu_quota=10%")
        throttled = share(service, service.workers()["neighbour"])
        print(f"share of the CPU that the neighbour has: {alone:.2f} alone, {both:.2f} beside a busy worker, "
              f"{throttled:.2f} beside the same one with a quota of 10 %: {throttled / alone:.2f}")  # fmt: skip
        assert both < 0.7 * alone
        assert throttled > 0.8 * alone
        group = f"/sys/fs/cgroup/llmos.slice/{scope(service, service.workers()['busy'])}"
        assert int(service.guest.out(f"awk '/^nr_throttled/ {{print $2}}' {group}/cpu.stat")) > 10
        service.guest.wait("word of it", "llmos ps busy | grep -q 'throttled by cpu_quota, which is 10%'")
        assert "strained" in service.llmos("events")
        service.llmos("limits", "busy", "cpu_quota=")
        service.guest.wait("word of its end", "llmos events | grep -q relieved")


def share(service: Service, pid: int) -> float:
    """The share of one CPU that a process has over three seconds."""
    look = f"cut -d' ' -f14,15 /proc/{pid}/stat"
    found = service.guest.out(f"date +%s.%N; {look}; sleep 3; date +%s.%N; {look}").splitlines()
    ticks = [sum(map(int, line.split())) for line in (found[1], found[3])]
    return (ticks[1] - ticks[0]) / 100 / (float(found[2]) - float(found[0]))


def test_a_restart_of_the_service_leaves_the_workers_and_a_stop_ends_them(service: Service) -> None:
    service.llmos("run", "sim", "one")
    service.llmos("start", "stubborn")
    before, marks, daemon = service.workers(), service.marks(), service.main_pid()
    service.run("touch /run/llmosd/scratch/sim@1/kept")
    service.run(f"systemctl restart {UNIT}")
    assert service.main_pid() != daemon
    assert service.workers() == before
    assert service.marks() == marks
    assert service.llmos("run", "sim", "one")
    service.run("test -e /run/llmosd/scratch/sim@1/kept")
    service.run(f"systemctl stop llmosd.socket llmosd-front.socket llmosd-back.socket {UNIT}")
    assert service.processes() == []
    left = "systemctl list-units --no-legend --all 'llmos-*.scope'"
    service.guest.wait("end of all scopes, the log writer's too", f'[ -z "$({left})" ]')


def test_frozen_workers_stay_frozen_over_a_restart(service: Service) -> None:
    service.llmos("run", "sim", "one")
    service.llmos("kill", "-s", "STOP", "sim")
    service.guest.wait("frozen worker", "llmos ps sim --output=json | grep -q '\"frozen\"'")
    pid = service.workers()["sim"]
    service.run(f"systemctl restart {UNIT}")
    service.guest.wait("frozen worker", "llmos ps sim --output=json | grep -q '\"frozen\"'")
    service.llmos("kill", "-s", "CONT", "sim")
    assert service.llmos("run", "sim", "one")
    assert service.workers()["sim"] == pid

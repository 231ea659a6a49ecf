"""`llmos limits` on real processes: changed live, seen in /proc, watched, kept, and refused where nobody could help."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from machine import SIMULATED, Machine, machine, wait_for

from llmos.errors import LlmosError

#: Threads to be seen in /proc, and memory on demand: the prompt says how many megabytes.
GREEDY = """
import threading

stay = threading.Event()
for _ in range(4):
    threading.Thread(target=stay.wait, daemon=True).start()
held = []


async def generate(request, *, path):
    held.append(bytearray(b"x") * (int(request["prompt"]) << 20))
    yield f"{len(held)} pieces"
"""


@pytest.fixture(scope="module")
def running() -> Iterator[Machine]:
    with machine() as made:
        engine = made.root / "greedy.py"
        engine.write_text(GREEDY)
        for name in ("greedy", "kept", "other"):
            made.model(f'model = "{name}"\n[engine]\ndriver = "python"\nfunction = "{engine}:generate"\n')
        made.model(SIMULATED)
        made.start()
        yield made


def limits(machine: Machine, *args: str) -> dict[str, Any]:
    """The limits of the first worker, after a change if one is given."""
    result = machine.llmos("limits", *args, "-o", "json")
    assert result.returncode == 0, result.stderr
    return {limit["name"]: limit for limit in json.loads(result.stdout)[0]["limits"]}


def refused(machine: Machine, *args: str) -> str:
    result = machine.llmos("limits", *args)
    assert result.returncode == 5, result.stdout + result.stderr
    return result.stderr


def threads(pid: int) -> list[Path]:
    return list(Path(f"/proc/{pid}/task").iterdir())


def nice_of(thread: Path) -> int:
    return int((thread / "stat").read_text().rpartition(")")[2].split()[16])


def cpus_of(thread: Path) -> str:
    lines = (thread / "status").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith("Cpus_allowed_list:"))


def test_nice_and_cpus_are_changed_live_on_every_thread(running: Machine) -> None:
    assert running.llmos("start", "greedy").returncode == 0
    pid = running.worker("greedy@1").pid
    assert len(threads(pid)) >= 5
    cpu = str(min(os.sched_getaffinity(0)))
    found = limits(running, "greedy", "nice=7", f"allowed_cpus={cpu}")
    assert (found["nice"]["configured"], found["nice"]["enforced_by"]) == ("7", "process")
    wait_for("nice 7 on every thread", lambda: {nice_of(thread) for thread in threads(pid)} == {7})
    wait_for("the CPU on every thread", lambda: {cpus_of(thread) for thread in threads(pid)} == {cpu})
    assert limits(running, "greedy")["nice"]["in_force"] == "7"
    # An empty value gives the default again.
    limits(running, "greedy", "allowed_cpus=")
    before = Path("/proc/self/status").read_text()
    wait_for("all CPUs", lambda: all(f"Cpus_allowed_list:\t{cpus_of(thread)}\n" in before for thread in threads(pid)))
    assert running.worker("greedy@1").pid == pid


def test_limits_of_one_worker_end_with_it(running: Machine) -> None:
    assert running.llmos("start", "other").returncode == 0
    limits(running, "other@1", "nice=3")
    pid = running.worker("other@1").pid
    wait_for("nice 3", lambda: {nice_of(thread) for thread in threads(pid)} == {3})
    assert running.llmos("restart", "other").returncode == 0
    pid = running.worker("other@1").pid
    assert {nice_of(thread) for thread in threads(pid)} == {os.getpriority(os.PRIO_PROCESS, os.getpid())}
    assert limits(running, "other")["nice"]["configured"] == ""


def test_who_takes_more_than_memory_max_is_ended_and_ps_says_why(running: Machine) -> None:
    assert running.llmos("start", "greedy").returncode == 0
    pid = running.worker("greedy@1").pid
    found = limits(running, "greedy", "memory_max=200M")
    assert found["memory_max"]["enforced_by"] == "watched"
    running.client.run("greedy", "10")
    assert running.worker("greedy@1").pid == pid
    running.client.run("greedy", "300")
    running.wait_worker("greedy@1", "backoff", "starting", "loading", "ready", not_pid=pid)
    events = running.llmos("events", "-o", "json").stdout.splitlines()
    said = [json.loads(line)["message"] for line in events if "memory_max" in line]
    assert any("of anonymous and shared memory; memory_max is 200M" in message for message in said)
    running.wait_worker("greedy@1", "ready")


def test_why_a_worker_over_its_memory_stays_down_is_in_ps(running: Machine) -> None:
    engine = running.root / "greedy.py"
    text = f"""
model = "once"
[engine]
driver = "python"
function = "{engine}:generate"
[limits]
memory_max = "150M"
[restart]
policy = "no"
"""
    assert running.llmos("apply", "-", stdin=text).returncode == 0
    with contextlib.suppress(LlmosError):  # it may be ended in the middle
        running.client.run("once", "300")
    running.wait_worker("once@1", "failed")
    (worker,) = json.loads(running.llmos("ps", "-a", "once", "-o", "json").stdout)
    assert "memory_max is 150M" in worker["why"]
    assert running.llmos("rm", "once").returncode == 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("cpu_quota=50%", "limits: cpu_quota needs "),
        ("memory_high=1G", "limits: memory_high needs "),
        ("allowed_cpus=8000", "limits: allowed_cpus names CPUs 8000; llmosd may use "),
        ("nice=99", "limits: nice: expected a whole number from -20 to 19, got 99"),
        ("memory_mx=1G", "limits: unknown key 'memory_mx'; did you mean 'memory_max'?"),
    ],
)
def test_a_limit_that_cannot_be_is_refused_with_the_reason_and_changes_nothing(
    running: Machine, change: str, reason: str
) -> None:
    if running.client.status().confinement != "process" and "needs" in reason:
        pytest.skip("this machine can enforce it")
    before = limits(running, "sim")
    assert reason in refused(running, "sim", "slots=2", change)
    assert {name: limit["configured"] for name, limit in limits(running, "sim").items()} == {
        name: limit["configured"] for name, limit in before.items()
    }


def test_a_model_file_with_a_limit_that_cannot_be_is_refused_too(running: Machine) -> None:
    if running.client.status().confinement != "process":
        pytest.skip("this machine can enforce it")
    result = running.llmos("apply", "-", stdin=SIMULATED.replace('"sim"', '"no"') + '[limits]\ncpu_quota = "50%"\n')
    assert result.returncode == 5
    assert "limits: cpu_quota needs a cgroup v2 tree" in result.stderr


def test_limits_of_a_model_outlive_the_daemon_and_the_rest_follows_the_file(running: Machine) -> None:
    limits(running, "kept", "nice=4", "slots=9")
    assert running.stop() == 0
    file = running.models / "kept.toml"
    file.write_text(file.read_text() + "[limits]\nslots = 2\nqueue_max = 77\nnice = 1\n")
    running.start()
    found = {name: limit["configured"] for name, limit in limits(running, "kept").items()}
    # What the operator set counts, and what was edited elsewhere in the file.
    assert (found["nice"], found["slots"], found["queue_max"]) == ("4", "9", "77")
    assert running.llmos("start", "kept").returncode == 0
    pid = running.worker("kept@1").pid
    assert {nice_of(thread) for thread in threads(pid)} == {4}
    # An applied file is a new word.
    assert running.llmos("apply", str(file)).returncode == 0
    found = {name: limit["configured"] for name, limit in limits(running, "kept").items()}
    assert (found["nice"], found["slots"], found["queue_max"]) == ("1", "2", "77")
    assert running.stop() == 0
    running.start()
    assert limits(running, "kept")["nice"]["configured"] == "1"
    assert running.llmos("rm", "kept").returncode == 0


def test_limits_that_cannot_be_read_any_more_are_left_out_and_said(running: Machine) -> None:
    limits(running, "sim", "slots=9")
    assert running.stop() == 0
    kept = running.root / "lib" / "limits" / "sim.json"
    assert json.loads(kept.read_text()) == {"slots": 9}
    kept.write_text("{half")
    running.start()
    assert limits(running, "sim")["slots"]["configured"] == "4"
    assert "model sim: the limits that were set on it cannot be read" in running.log()


def test_limits_that_change_while_a_worker_is_being_started_are_in_force_when_it_is_up(a_machine: Machine) -> None:
    a_machine.model(SIMULATED + "[limits]\nnice = 3\n")
    a_machine.prepare_failpoint("spawn.grouped=delay(1000)")
    a_machine.start()
    client = a_machine.client
    a_machine.arm()
    client.start("sim")
    client.set_limits("sim", {"nice": "7"})
    worker = a_machine.wait_worker("sim@1", "ready")
    wait_for("nice value", lambda: os.getpriority(os.PRIO_PROCESS, worker.pid) == 7, 5)
    a_machine.kill()
    a_machine.start()
    limits = {limit.name: limit.in_force for limit in a_machine.client.limits("sim@1")[0].limits}
    assert limits["nice"] == "7"

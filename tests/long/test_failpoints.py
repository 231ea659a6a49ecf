"""The daemon dies by SIGKILL at every failpoint, whatever the worker concerned is doing, under load.

After the next daemon has started: no process without a worker and none twice, a cgroup for each that lives and for
nothing else, the bystander the same process as before with every stream of its complete, the ledger agreeing with who
is alive, the worker concerned where the operator wanted it, and how it ended told exactly or not at all.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable

import pytest
from load import STREAMS, Load
from machine import DEADLINE_S, Machine, wait_for
from matrix import ABSENT, CELLS, NOTHING, Cell, Outcome, outcome, told

import llmos
from llmos.errors import LlmosError
from llmos.types import Worker
from llmosd.failpoint import NAMES

TARGET = """
model = "target"
[engine]
driver = "simulated"
load_time = "{load}"
decode_rate = 20
[resources]
cpus = 0.25
memory = "64M"
[restart]
policy = "always"
delay = "100ms"
burst = 0
[timeouts]
drain = "2s"
stop = "3s"
"""
#: One that says when it is ready: by a line, which the next daemon could not find again.
TELLING = """
model = "target"
kind = "service"
[engine]
driver = "command"
command = ["sh", "-c", "echo is up; exec sleep 1000"]
[ready]
log = "^is up$"
[resources]
cpus = 0.25
memory = "64M"
[restart]
policy = "always"
"""
BYSTANDER = f"""
model = "bystander"
[engine]
driver = "simulated"
load_time = "50ms"
decode_rate = 50
[resources]
cpus = 0.5
memory = "128M"
[limits]
slots = {STREAMS}
[scale]
min = 1
"""


def tolerant(call: Callable[[llmos.Client], object], machine: Machine) -> None:
    """Ask the daemon something that it may not live to answer."""

    def ask() -> None:
        with contextlib.suppress(LlmosError), llmos.Client(str(machine.runtime), patience=0.2) as client:
            call(client)

    threading.Thread(target=ask, daemon=True).start()


def bring_to(machine: Machine, state: str) -> None:
    """Have the target in a state."""
    client = machine.client
    if state == "stopped":
        return
    if state == "held":
        client.stop("target")
        return
    client.start("target")
    if state == "loading":
        machine.wait_worker("target@1", "loading")
        return
    machine.wait_worker("target@1", "ready")
    if state in ("busy", "draining"):
        tolerant(lambda other: other.run("target", "long", max_tokens=2000, timeout=20), machine)
        wait_for("request that runs", lambda: machine.worker("target@1").slots_used)
    if state == "draining":
        client.stop("target")
        machine.wait_worker("target@1", "draining")
    if state == "frozen":
        client.kill("target@1", signal.SIGSTOP)
        machine.wait_worker("target@1", "frozen")


def operate(machine: Machine, operation: str, state: str) -> None:
    """Do what makes the daemon pass the failpoint."""
    if operation == "start" and state == "backoff":
        machine.client.start("target")
        machine.wait_worker("target@1", "ready")
        machine.arm()
        tolerant(lambda client: client.kill("target@1", signal.SIGKILL), machine)
    elif operation == "start":
        machine.arm()
        tolerant(lambda client: client.start("target"), machine)
    elif operation == "stop":
        machine.arm()
        tolerant(lambda client: client.stop("target", now=True), machine)
    elif operation == "kill":
        machine.arm()
        tolerant(lambda client: client.kill("target@1", signal.SIGKILL), machine)
    elif operation == "upgrade":
        machine.arm()
        tolerant(lambda client: client.upgrade(), machine)
    elif operation == "apply":
        machine.arm()
        changed = TARGET.format(load="60ms")
        tolerant(lambda client: client.apply(changed, file_name="target.toml"), machine)
    else:
        machine.kill()
        machine.arm()
        machine.start(expect_failure=True)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_a_daemon_that_dies_leaves_nothing_that_the_next_one_does_not_put_right(
    a_machine: Machine, cell: Cell, record_property: Callable[[str, object], None]
) -> None:
    record_property("cell", " ".join(cell))
    failpoint, state, operation = cell
    telling = failpoint == "ready.recorded"
    a_machine.model(TELLING if telling else TARGET.format(load="2s" if state == "loading" else "50ms"))
    a_machine.model(BYSTANDER)
    a_machine.prepare_failpoint(f"{failpoint}=kill")
    a_machine.start()
    before = a_machine.wait_worker("bystander@1", "ready")
    load = Load(a_machine.runtime, "bystander")
    if operation != "start" or state in ("stopped", "held"):
        bring_to(a_machine, state)
    earlier = target(a_machine)
    operate(a_machine, operation, state)

    assert a_machine.daemon is not None
    assert a_machine.daemon.wait(DEADLINE_S) == -signal.SIGKILL
    a_machine.daemon = None
    a_machine.disarm()
    a_machine.start()

    after = a_machine.wait_worker("bystander@1", "ready")
    assert (after.pid, after.restarts) == (before.pid, before.restarts)
    must = outcome(cell)
    wait_for(f"target that is {must}", lambda: is_as(target(a_machine), must))
    found = target(a_machine)
    last_exit = found.last_exit if found is not None else NOTHING
    record_property("told", told(cell, last_exit))
    if found is not None and earlier is not None and told(cell, last_exit) == "no exit":
        assert (found.pid, found.restarts) == (earlier.pid, earlier.restarts), "the same life goes on"
    check_machine(a_machine)
    # It serves: whatever had been done to it, an operator can have it again.
    a_machine.client.start("target")
    if a_machine.worker("target@1").state == "frozen":
        a_machine.client.kill("target@1", signal.SIGCONT)
    a_machine.wait_worker("target@1", "ready")
    if not telling:
        assert len(a_machine.client.run("target", "again", max_tokens=3, timeout=30).text.split()) == 3
    load.stop()
    check_machine(a_machine)
    a_machine.client.stop("target", now=True)


def target(machine: Machine) -> Worker | None:
    """The target, if the daemon knows of it."""
    workers = [worker for worker in machine.watcher.ps(include_stopped=True) if worker.model == "target"]
    assert len(workers) <= 1
    return workers[0] if workers else None


def is_as(worker: Worker | None, must: Outcome) -> bool:
    if worker is None:
        return ABSENT in must.states
    return worker.state in must.states and worker.last_exit in must.exits


def check_machine(machine: Machine) -> None:
    """No process, no cgroup and no reservation besides those of the workers that live."""
    machine.check_processes()
    machine.check_cgroups()
    check_ledger(machine)


def check_ledger(machine: Machine) -> None:
    """What is reserved is what those who live hold."""

    def agrees() -> bool:
        devices = {device.id: device.reserved for device in machine.watcher.devices().devices}
        alive = [worker for worker in machine.watcher.ps() if worker.pid]
        return abs(devices["cpus"] - sum(worker.cpus for worker in alive)) < 1e-6 and devices["memory"] == sum(
            worker.memory_reserved_bytes for worker in alive
        )

    assert wait_for("ledger that agrees with the machine", agrees)


def test_the_matrix_covers_every_failpoint_there_is() -> None:
    assert {cell.failpoint for cell in CELLS} == set(NAMES)

"""The daemon dies by SIGKILL at every failpoint, whatever the worker concerned is doing, under load.

After the next daemon has started: no process without a worker and none twice, the bystander the same process as
before with every stream of its complete, the ledger agreeing with who is alive, and the worker concerned where the
operator wanted it.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable

import pytest
from load import Load
from machine import DEADLINE_S, Machine, wait_for

import llmos
from llmos.errors import LlmosError
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
drain = "3s"
stop = "3s"
"""
BYSTANDER = """
model = "bystander"
[engine]
driver = "simulated"
load_time = "50ms"
decode_rate = 100
[resources]
cpus = 0.5
memory = "128M"
[limits]
slots = 8
[scale]
min = 1
"""

SPAWN = [name for name in NAMES if name.startswith("spawn.")]
STOP = [name for name in NAMES if name.startswith("stop.")]
ENDS = [name for name in NAMES if name.startswith(("kill.", "exit.", "empty."))]
ADOPT = [name for name in NAMES if name.startswith("adopt.")]

#: (failpoint, state of the target, what is done to it)
CELLS = [
    *((name, state, "start") for name in SPAWN for state in ("stopped", "backoff")),
    *((name, state, "stop") for name in STOP for state in ("loading", "ready", "busy", "frozen")),
    *((name, state, "kill") for name in ENDS for state in ("loading", "ready", "busy", "frozen", "draining")),
    *((name, state, "stop") for name in ENDS for state in ("loading", "ready", "busy", "frozen")),
    *((name, state, "restart") for name in ADOPT for state in ("loading", "ready", "busy", "frozen", "draining")),
    *(("models.read", state, "restart") for state in ("ready", "busy", "draining")),
    *(("held.kept", state, "stop") for state in ("loading", "ready", "busy", "frozen")),
    ("held.kept", "held", "start"),
    ("apply.kept", "ready", "apply"),
    ("apply.kept", "stopped", "apply"),
]


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
    elif operation == "apply":
        machine.arm()
        changed = TARGET.format(load="60ms")
        tolerant(lambda client: client.apply(changed, file_name="target.toml"), machine)
    else:
        machine.kill()
        machine.arm()
        machine.start(expect_failure=True)


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("failpoint", "state", "operation"), CELLS)
def test_a_daemon_that_dies_leaves_nothing_that_the_next_one_does_not_put_right(
    a_machine: Machine, failpoint: str, state: str, operation: str
) -> None:
    a_machine.model(TARGET.format(load="2s" if state == "loading" else "50ms"))
    a_machine.model(BYSTANDER)
    a_machine.prepare_failpoint(f"{failpoint}=kill")
    a_machine.start()
    before = a_machine.wait_worker("bystander@1", "ready")
    load = Load(a_machine.runtime, "bystander")
    if operation != "start" or state in ("stopped", "held"):
        bring_to(a_machine, state)
    operate(a_machine, operation, state)

    assert a_machine.daemon is not None
    assert a_machine.daemon.wait(DEADLINE_S) == -signal.SIGKILL
    a_machine.daemon = None
    a_machine.disarm()
    a_machine.start()

    after = a_machine.wait_worker("bystander@1", "ready")
    assert (after.pid, after.restarts) == (before.pid, before.restarts)
    wait_for("target that has settled", lambda: is_settled(a_machine))
    if failpoint == "held.kept":
        assert a_machine.client.model("target").state == ("stopped" if operation == "stop" else "idle")
    a_machine.check_processes()
    check_ledger(a_machine)
    # It serves: whatever had been done to it, an operator can have it again.
    a_machine.client.start("target")
    if a_machine.worker("target@1").state == "frozen":
        a_machine.client.kill("target@1", signal.SIGCONT)
    a_machine.wait_worker("target@1", "ready")
    assert len(a_machine.client.run("target", "again", max_tokens=3, timeout=30).text.split()) == 3
    load.stop()
    a_machine.check_processes()
    check_ledger(a_machine)
    assert load.done >= len(load._threads)


def is_settled(machine: Machine) -> bool:
    """The target is neither awaited nor on its way down."""
    return all(worker.state not in ("adopted", "stopping") for worker in machine.client.ps("target"))


def check_ledger(machine: Machine) -> None:
    """What is reserved is what those who live hold."""

    def agrees() -> bool:
        devices = {device.id: device.reserved for device in machine.client.devices().devices}
        alive = [worker for worker in machine.client.ps() if worker.pid]
        return abs(devices["cpus"] - sum(worker.cpus for worker in alive)) < 1e-6 and devices["memory"] == sum(
            worker.memory_reserved_bytes for worker in alive
        )

    assert wait_for("ledger that agrees with the machine", agrees)


def test_the_matrix_covers_every_failpoint_there_is() -> None:
    assert {name for name, _, _ in CELLS} == set(NAMES)
    print(f"failpoint matrix: {len(CELLS)} cells over {len(NAMES)} failpoints")

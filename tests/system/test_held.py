"""What an operator has stopped stays down, whoever kills the daemon; and the file that says so may be damaged."""

from __future__ import annotations

import pytest
from commands import done, rows
from machine import DEADLINE_S, SIMULATED, Machine, wait_for

import llmos
from llmos.errors import LlmosError

KEPT = f"{SIMULATED}\n[scale]\nmin = 1\n"


def state(machine: Machine) -> str:
    return str(rows(machine, "models")[0]["state"])


@pytest.mark.parametrize("name", ["sim", "sim@1"])
def test_what_was_stopped_is_not_started_by_the_next_daemon(a_machine: Machine, name: str) -> None:
    a_machine.model(KEPT)
    a_machine.start()
    a_machine.wait_worker("sim@1", "ready")
    done(a_machine, "stop", name)
    for _ in range(2):
        a_machine.kill()
        a_machine.start()
        assert a_machine.worker("sim@1").state == "stopped"
    assert "sim@1 starting" not in a_machine.log().rpartition("sim@1 stopped")[2]
    done(a_machine, "start", name)
    a_machine.kill()
    a_machine.start()
    a_machine.wait_worker("sim@1", "ready")


def test_a_daemon_that_dies_over_a_stop_leaves_it_to_the_next(a_machine: Machine) -> None:
    a_machine.model(KEPT)
    a_machine.env["LLMOSD_FAILPOINTS"] = "held.kept=kill"
    a_machine.start()
    a_machine.wait_worker("sim@1", "ready")
    assert a_machine.daemon is not None
    with llmos.Client(str(a_machine.runtime), patience=0.2) as client, pytest.raises(LlmosError):
        client.stop("sim")
    a_machine.daemon.wait(DEADLINE_S)
    del a_machine.env["LLMOSD_FAILPOINTS"]
    a_machine.start()
    a_machine.wait_worker("sim@1", "stopped")
    assert state(a_machine) == "stopped"


def test_a_damaged_file_costs_the_stop_and_not_the_daemon(a_machine: Machine) -> None:
    a_machine.model(KEPT)
    a_machine.start()
    a_machine.wait_worker("sim@1", "ready")
    done(a_machine, "stop", "sim")
    a_machine.kill()
    (a_machine.runtime / "held.json").write_bytes(b'{"models": ["si')
    a_machine.start()
    a_machine.wait_worker("sim@1", "ready")
    assert "may be started again" in a_machine.log()
    assert (a_machine.runtime / "held.damaged").exists()


def test_a_file_that_cannot_be_written_is_warned_of_and_the_stop_is_in_force(a_machine: Machine) -> None:
    a_machine.model(KEPT)
    a_machine.env["LLMOSD_FAILPOINTS"] = "held.kept=error(no room)"
    a_machine.start()
    a_machine.wait_worker("sim@1", "ready")
    done(a_machine, "stop", "sim")
    assert state(a_machine) == "stopped"
    warned = wait_for("warning", lambda: [e.message for e in a_machine.client.events() if e.kind == "warning"])
    assert "is stopped by operators: [Errno 5] no room" in warned[0]

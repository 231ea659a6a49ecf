"""Models that require each other, with real processes: the order of starts and stops, and causes that are named."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import done, fails, rows
from machine import Machine, machine, wait_for

BASE = """
model = "base"
aliases = ["ground"]
[engine]
driver = "simulated"
load_time = "300ms"
"""
MIDDLE = """
model = "middle"
requires = ["ground"]
[engine]
driver = "simulated"
load_time = "100ms"
"""
TOP = """
model = "top"
kind = "service"
requires = ["middle"]
[engine]
driver = "command"
command = ["sleep", "1000"]
"""
BROKEN = """
model = "broken"
[engine]
driver = "command"
command = ["/nowhere/to/be/found"]
"""
HAPLESS = """
model = "hapless"
requires = ["broken"]
[engine]
driver = "simulated"
[scale]
min = 1
"""


@pytest.fixture(scope="module")
def running() -> Iterator[Machine]:
    with machine() as made:
        for text in (TOP, MIDDLE, BASE, BROKEN, HAPLESS):
            made.model(text)
        made.start()
        yield made


def order(machine: Machine, *steps: str) -> list[str]:
    """Of these steps, written `worker state`, in which order they happened last."""
    happened = [f"{event.subject} {event.kind}" for event in machine.client.events()]
    last = {step: index for index, step in enumerate(happened) if step in steps}
    assert set(last) == set(steps), happened
    return sorted(steps, key=last.__getitem__)


def model(machine: Machine, name: str) -> dict[str, str]:
    return next(row for row in rows(machine, "models") if row["name"] == name)


def test_what_is_required_is_ready_before_who_requires_it_is_started(running: Machine) -> None:
    assert "top@1 is ready, pid " in done(running, "start", "top")
    steps = ("base@1 starting", "base@1 ready", "middle@1 starting", "middle@1 ready", "top@1 starting")
    assert order(running, *steps) == list(steps)


def test_a_stop_ends_who_requires_first_and_a_start_of_it_says_for_what_it_waits(running: Machine) -> None:
    done(running, "start", "top")
    assert done(running, "stop", "ground") == "base@1 is stopped.\n"
    steps = ("top@1 stopped", "middle@1 stopping", "middle@1 stopped", "base@1 stopping")
    assert order(running, *steps) == list(steps)
    assert model(running, "middle")["state"] == "idle"
    reason = "requires ground, which was stopped by an operator; `llmos start base` starts it"
    assert model(running, "middle")["why"] == reason
    assert reason in fails(running, 5, "start", "top")
    assert reason in fails(running, 1, "run", "middle", "x")
    done(running, "reset", "base")
    assert model(running, "base")["state"] == "stopped"
    done(running, "start", "base")
    assert "middle@1 waits for ground" not in done(running, "start", "--no-wait", "middle")
    running.wait_worker("middle@1", "ready")


def test_a_request_waits_until_all_that_is_required_is_up(running: Machine) -> None:
    done(running, "stop", "base")
    done(running, "start", "base")
    done(running, "stop", "base", "--now")
    done(running, "start", "--no-wait", "base")
    assert len(done(running, "run", "middle", "x", "--max-tokens", "2").split()) == 2


def test_a_restart_is_passed_on_and_a_crash_is_not(running: Machine) -> None:
    done(running, "start", "top")
    before = {worker.name: worker.pid for worker in running.client.ps()}
    running.client.kill("base@1", 9)
    running.wait_worker("base@1", "ready", not_pid=before["base@1"])
    assert running.worker("top@1").pid == before["top@1"]
    done(running, "restart", "base")
    running.wait_worker("middle@1", "ready", not_pid=before["middle@1"])
    running.wait_worker("top@1", "ready", not_pid=before["top@1"])
    steps = ("top@1 stopped", "middle@1 stopped", "base@1 starting", "middle@1 starting", "top@1 starting")
    assert order(running, *steps) == list(steps)


def test_a_dependency_that_has_failed_is_named(running: Machine) -> None:
    wait_for("failure", lambda: model(running, "broken")["state"] == "failed")
    wait_for("reason", lambda: "which has failed" in model(running, "hapless")["why"])
    assert "requires broken, which has failed: " in done(running, "ps", "-a")
    assert "requires broken, which has failed: " in done(running, "models", "-v")
    assert "/nowhere/to/be/found" in (why := fails(running, 1, "run", "hapless", "x"))
    assert "`llmos reset broken` clears it" in why
    assert model(running, "hapless")["requires"] == ["broken"]


def test_a_circle_is_refused_and_written_out(running: Machine, tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text(f'requires = ["top"]\n{BASE}')
    said = fails(running, 5, "apply", str(tmp_path / "base.toml"))
    assert "base requires top requires middle requires base" in said
    assert (running.models / "base.toml").read_text() == BASE


def test_a_reload_refuses_one_file_of_a_circle_and_turns_an_order_round(running: Machine) -> None:
    running.model(f'requires = ["middle"]\n{BASE}')
    assert "base requires middle requires base" in fails(running, 5, "reload")
    running.model(MIDDLE.replace('requires = ["ground"]\n', ""))
    done(running, "reload")
    assert model(running, "base")["requires"] == ["middle"]
    running.model(BASE)
    running.model(MIDDLE)
    done(running, "reload")
    assert model(running, "middle")["requires"] == ["ground"]


def test_a_daemon_that_ends_stops_in_reverse_order(a_machine: Machine) -> None:
    for text in (BASE, MIDDLE, TOP):
        a_machine.model(text)
    a_machine.start()
    done(a_machine, "start", "top")
    assert a_machine.stop() == 0
    log = a_machine.log()
    places = [log.index(f"{step}: llmosd is") for step in ("top@1 stopping", "middle@1 stopping", "base@1 stopping")]
    assert places == sorted(places)
    assert log.index("top@1 stopped") < places[1]
    assert log.index("middle@1 stopped") < places[2]

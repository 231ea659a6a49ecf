"""The daemon's program is replaced in place, under load, and nobody notices."""

from __future__ import annotations

import os
import signal
import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from machine import DEADLINE_S, SIMULATED, Machine, wait_for

import llmos
from llmos.errors import Refused

STREAMS = 12
TOKENS = 40
BUSY = """
[limits]
slots = 16
[scale]
min = 1
[timeouts]
drain = "2s"
"""
COMMAND = """
model = "plain"
kind = "service"
[engine]
driver = "command"
command = ["sleep", "1000"]
[scale]
min = 1
[restart]
policy = "no"
"""


class Doing:
    """Something done again and again by threads, until it fails or is told to end."""

    def __init__(self, *what: Callable[[int], None], count: int) -> None:
        self.done = [0] * len(what)
        self.problems: list[str] = []
        self._end = threading.Event()
        self._threads = [
            threading.Thread(target=self._go, args=(index, one, number))
            for index, one in enumerate(what)
            for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def _go(self, index: int, what: Callable[[int], None], number: int) -> None:
        while not self._end.is_set():
            try:
                what(number)
            except Exception as error:  # noqa: BLE001  # whatever it is, the test shows it
                self.problems.append(f"{type(error).__name__}: {error}")
                return
            self.done[index] += 1

    def wait_further(self) -> None:
        """Wait until each kind was done several times more."""
        goal = [count + STREAMS for count in self.done]
        wait_for("progress", lambda: self.problems or all(map(int.__le__, goal, self.done)))

    def end(self) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(DEADLINE_S)
        assert not self.problems, self.problems


def descriptors(machine: Machine) -> int:
    assert machine.daemon is not None
    return len(list(Path(f"/proc/{machine.daemon.pid}/fd").iterdir()))


@pytest.mark.timeout(180)
def test_an_upgrade_under_load_fails_no_request_and_keeps_process_workers_and_sockets(a_machine: Machine) -> None:
    a_machine.configure(gateway=True)
    a_machine.model(SIMULATED + BUSY)
    a_machine.model(COMMAND)
    a_machine.start()
    before = {name: a_machine.wait_worker(name, "ready").pid for name in ("sim@1", "plain@1", "gateway@1")}
    client = a_machine.client
    expected = [client.run("sim", f"stream {n}", max_tokens=TOKENS).text for n in range(STREAMS)]
    control = llmos.Client(str(a_machine.runtime), patience=30)

    def stream(number: int) -> None:
        pieces = client.run("sim", f"stream {number}", stream=True, max_tokens=TOKENS, timeout=60)
        text = "".join(piece.text for piece in pieces)
        assert text == expected[number], f"{text!r} is not {expected[number]!r}"

    def ask_over_http(number: int) -> None:
        body = f'{{"model": "sim", "prompt": "one {number}", "max_tokens": 5}}'.encode()
        with urllib.request.urlopen(f"{a_machine.url}/v1/completions", body, timeout=60) as answer:
            assert answer.status == 200

    doing = Doing(stream, ask_over_http, lambda _: str(control.ps()), count=STREAMS)
    try:
        doing.wait_further()
        open_before = []
        for _ in range(3):
            done = a_machine.llmos("upgrade")
            assert done.returncode == 0, done.stderr
            assert f"pid {a_machine.daemon.pid}, serves again after" in done.stdout  # type: ignore[union-attr]
            doing.wait_further()
            open_before.append(descriptors(a_machine))
        assert {name: a_machine.worker(name).pid for name in before} == before
        assert a_machine.client.status().uptime < 60
    finally:
        doing.end()
        control.close()
    assert open_before[2] <= open_before[1] + 16, f"descriptors leak from program to program: {open_before}"
    a_machine.check_processes()
    print(f"requests over three upgrades: {doing.done[0]} streams, {doing.done[1]} over HTTP, {doing.done[2]} calls")
    # They are its children still, so their ends are known exactly.
    os.kill(before["plain@1"], signal.SIGTERM)
    assert a_machine.wait_worker("plain@1", "stopped").last_exit == "killed by signal 15"


def test_an_upgrade_to_a_program_that_does_not_work_is_refused_and_the_old_one_goes_on(a_machine: Machine) -> None:
    a_machine.model(SIMULATED + "[scale]\nmin = 1\n")
    a_machine.start()
    pid = a_machine.wait_worker("sim@1", "ready").pid
    a_machine.configure("[logs]\nlevel = 7\n")
    with pytest.raises(Refused, match=r"llmosd goes on as it is.*logs\.level"):
        a_machine.client.upgrade()
    assert a_machine.llmos("upgrade").returncode == 5
    a_machine.configure()
    uptime = a_machine.client.status().uptime
    assert a_machine.client.upgrade().uptime < uptime
    assert a_machine.worker("sim@1").pid == pid


def test_signals_that_come_while_the_program_is_replaced_are_heeded_by_the_new_one(a_machine: Machine) -> None:
    a_machine.model(SIMULATED + "[scale]\nmin = 1\n")
    a_machine.start()
    a_machine.wait_worker("sim@1", "ready")
    assert a_machine.daemon is not None
    rounds = 3
    for _ in range(rounds):
        upgrading = threading.Thread(target=a_machine.client.upgrade)
        upgrading.start()
        while upgrading.is_alive():
            a_machine.daemon.send_signal(signal.SIGHUP)
            upgrading.join(0.02)
    assert a_machine.log().count("upgrading: the program is replaced") == rounds
    assert a_machine.stop() == 0


@pytest.mark.parametrize("failpoint", ["upgrade.checked", "upgrade.closed"])
def test_a_daemon_killed_in_the_middle_of_an_upgrade_is_followed_by_one_that_adopts(
    a_machine: Machine, failpoint: str
) -> None:
    a_machine.model(SIMULATED + "[scale]\nmin = 1\n")
    a_machine.prepare_failpoint(f"{failpoint}=kill")
    a_machine.start()
    pid = a_machine.wait_worker("sim@1", "ready").pid
    a_machine.arm()
    with llmos.Client(str(a_machine.runtime), patience=0.5) as client, pytest.raises(llmos.LlmosError):
        client.upgrade()
    assert a_machine.daemon is not None and a_machine.daemon.wait(DEADLINE_S) == -signal.SIGKILL
    a_machine.disarm()
    a_machine.start()
    assert a_machine.wait_worker("sim@1", "ready").pid == pid
    a_machine.check_processes()


def test_a_stop_that_comes_during_an_upgrade_is_heeded(a_machine: Machine) -> None:
    a_machine.model(SIMULATED + "[scale]\nmin = 1\n")
    a_machine.start()
    a_machine.wait_worker("sim@1", "ready")
    assert a_machine.daemon is not None
    # A reader of events holds the old program up for its grace, which is when the signal comes.
    following = threading.Thread(target=lambda: [None for _ in a_machine.client.events(follow=True)], daemon=True)
    following.start()
    threading.Thread(target=lambda: a_machine.llmos("upgrade"), daemon=True).start()
    wait_for("upgrade under way", lambda: "upgrading: the program is replaced" in a_machine.log())
    a_machine.daemon.send_signal(signal.SIGTERM)
    assert a_machine.daemon.wait(DEADLINE_S) == 0
    a_machine.daemon = None
    assert wait_for("end of all processes", lambda: not a_machine.processes())

"""Engines that stop answering: ended and started again, with the reason; and those that only look as if they did."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from engine_models import openai
from machine import Machine, free_port, machine, wait_for
from test_drivers import attached, started

from llmos.types import Worker

LIVENESS = '[liveness]\ninterval = "500ms"\ntimeout = "1s"\nfailures = 2\n'
#: Seconds in which one that hangs is found to.
HUNG_S = 0.5 + 1 * 2
HUNG = "the engine hung: no answer on /health in 1s, 2 times in a row"


@pytest.fixture(scope="module")
def shared() -> Iterator[Machine]:
    """One daemon for all tests here: each uses models of its own."""
    with machine() as made:
        made.start()
        yield made


def asked(name: str, *args: str, rate: int = 500) -> str:
    return openai(name, "openai_like.py", "--port", "{port}", "--rate", str(rate), *args) + LIVENESS


def up(machine: Machine, text: str) -> Worker:
    machine.client.apply(text)
    (name,) = machine.client.start(text.split('model = "', 1)[1].split('"', 1)[0]).workers
    return machine.wait_worker(name, "ready")


def reasons(machine: Machine, worker: str) -> list[str]:
    return [event.message for event in machine.client.events() if event.subject == worker]


def same_for(machine: Machine, seconds: float, *before: Worker) -> None:
    """They stay as they are, all this time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for worker in before:
            now = machine.worker(worker.name)
            assert (now.state, now.pid, now.engine_pid) == ("ready", worker.pid, worker.engine_pid), now.why
        time.sleep(0.05)


def test_an_idle_engine_that_hangs_is_ended_and_its_worker_comes_back_and_says_so(shared: Machine) -> None:
    before = up(shared, asked("idle").replace('delay = "200ms"', 'delay = "30s"').replace('"1s"', '"30s"', 1))
    began = time.monotonic()
    os.kill(before.engine_pid, signal.SIGSTOP)
    assert shared.wait_worker("idle@1", "backoff").why == HUNG
    assert time.monotonic() - began < HUNG_S + 3
    assert HUNG in shared.llmos("ps").stdout
    assert any(HUNG in line for line in shared.client.logs("idle@1"))
    shared.client.start("idle")
    assert shared.wait_worker("idle@1", "ready").engine_pid != before.engine_pid
    shared.client.remove("idle")


def test_an_engine_that_hangs_in_the_middle_of_a_request_is_caught_and_the_request_runs_again(shared: Machine) -> None:
    before = up(shared, asked("busy", rate=10))
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(shared.client.run, "busy", "hello", max_tokens=10, timeout=30)
        wait_for("request that runs", lambda: shared.worker("busy@1").slots_used)
        os.kill(before.engine_pid, signal.SIGSTOP)
        assert answer.result(60).text == "".join(f" w{index}" for index in range(10))
    assert HUNG in reasons(shared, "busy@1")
    assert shared.worker("busy@1").restarts == before.restarts + 1
    shared.client.remove("busy")


def test_an_engine_that_streams_and_answers_nothing_else_meanwhile_is_not_taken_for_hung(shared: Machine) -> None:
    before = up(shared, asked("single", "--single", rate=10))
    pieces = shared.client.run("single", "hello", stream=True, max_tokens=40)
    assert len([piece.text for piece in pieces if piece.text]) == 40  # four seconds
    now = shared.worker("single@1")
    assert (now.pid, now.engine_pid) == (before.pid, before.engine_pid)
    shared.client.remove("single")


def test_who_answers_was_frozen_or_is_not_asked_is_not_taken_for_hung(shared: Machine) -> None:
    well, frozen = up(shared, asked("well")), up(shared, asked("frozen"))
    unasked = up(shared, asked("unasked").replace('interval = "500ms"', "interval = 0"))
    os.kill(unasked.engine_pid, signal.SIGSTOP)
    shared.client.kill("frozen@1", signal.SIGSTOP)
    shared.wait_worker("frozen@1", "frozen")
    same_for(shared, HUNG_S * 1.2, well, unasked)
    shared.client.kill("frozen@1", signal.SIGCONT)
    shared.wait_worker("frozen@1", "ready")
    same_for(shared, HUNG_S * 1.2, frozen)
    os.kill(unasked.engine_pid, signal.SIGCONT)
    for worker in (well, frozen, unasked):
        shared.client.remove(worker.model)


def test_an_attached_engine_that_hangs_is_left_alone_and_its_worker_waits_for_it(shared: Machine) -> None:
    port = free_port()
    with started(port) as engine:
        before = up(shared, attached("elsewhere", port) + LIVENESS)
        os.kill(engine.pid, signal.SIGSTOP)
        after = shared.wait_worker("elsewhere@1", "loading", not_pid=before.pid)
        assert after.restarts == before.restarts + 1
        said = reasons(shared, "elsewhere@1")
        assert any("does not answer any more: no answer on /health in 1s" in one for one in said), said
        assert engine.poll() is None
        os.kill(engine.pid, signal.SIGCONT)
        assert shared.wait_worker("elsewhere@1", "ready").pid == after.pid
        shared.client.remove("elsewhere")
        engine.kill()

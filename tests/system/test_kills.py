"""Workers that are killed under load: what runs, what waits, and what is left."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from engine_models import gemma, openai, simulated
from machine import Machine, machine, wait_for

from llmos.errors import WorkerLost
from llmos.types import Worker

#: Seconds over the back-off in which a busy machine starts the next life.
SLACK_S = 1.0


@pytest.fixture(scope="module")
def shared(gemma_weights: Path) -> Iterator[Machine]:
    """One daemon for all tests here: each uses models of its own."""
    with machine() as made:
        made.model(gemma(gemma_weights))
        made.model(openai("stub", "openai_like.py", "--port", "{port}", "--rate", "50"))
        made.model(simulated("sim", decode_rate=50).replace("[timeouts]", '[timeouts]\nsilence = "400ms"'))
        made.start()
        yield made


def kill_host(machine: Machine, worker: Worker) -> None:
    os.kill(worker.pid, signal.SIGKILL)


def kill_engine(machine: Machine, worker: Worker) -> None:
    os.kill(worker.engine_pid, signal.SIGKILL)


def kill_both(machine: Machine, worker: Worker) -> None:
    os.kill(worker.pid, signal.SIGSTOP)  # or it would see its engine die, and say so
    os.kill(worker.engine_pid, signal.SIGKILL)
    os.kill(worker.pid, signal.SIGKILL)


def kill_by_command(machine: Machine, worker: Worker) -> None:
    done = machine.llmos("kill", "-s", "KILL", worker.name)
    assert done.returncode == 0, done.stderr


def check_restart(machine: Machine, before: Worker, since: int) -> Worker:
    """It came back within its back-off, once, with nothing left of its earlier life."""
    after = machine.wait_worker(before.name, "ready", not_pid=before.pid)
    assert after.restarts == before.restarts + 1
    times = {e.kind: e.time for e in machine.client.events(after=since) if e.subject == before.name}
    assert {"exited", "backoff", "starting"} <= set(times)
    # The first delay is 200 ms, half of it jitter.
    assert times["starting"] - times["backoff"] < 0.2 + SLACK_S
    assert times["backoff"] - times["exited"] < SLACK_S
    machine.check_processes()
    assert not any(Path(f"/proc/{pid}").exists() for pid in (before.pid, before.engine_pid))
    return after


@pytest.mark.model
@pytest.mark.parametrize(
    ("model", "kill"),
    [("gemma", kill_engine), ("gemma", kill_both), ("stub", kill_host), ("stub", kill_engine), ("stub", kill_both),
     ("stub", kill_by_command)],
)  # fmt: skip
def test_a_killed_worker_comes_back_and_only_what_had_begun_is_lost(
    shared: Machine, model: str, kill: Callable[[Machine, Worker], None]
) -> None:
    client = shared.client
    before = client.wait(client.start(model).workers)[0]
    since = max(event.cursor for event in client.events())
    with ThreadPoolExecutor() as pool:
        begun = client.run(model, "Once upon a time", stream=True, max_tokens=600, ignore_eos=True)
        assert next(begun).text
        # In the other slot, and not a token of it was passed on.
        unseen = pool.submit(client.run, model, "The capital of France is", max_tokens=20, temperature=0)
        wait_for("request in each slot", lambda: shared.worker(before.name).slots_used == 2)
        queued = [pool.submit(client.run, model, f"The number {n} is", max_tokens=4) for n in range(4)]
        wait_for("queue", lambda: shared.client.model(model).queue == 4)
        kill(shared, before)
        with pytest.raises(WorkerLost, match=before.name):
            for _ in begun:
                pass
        assert unseen.result(60).completion_tokens > 0
        assert all(answer.result(60).completion_tokens > 0 for answer in queued)
    check_restart(shared, before, since)


def test_a_frozen_worker_is_not_hung_and_goes_on_where_it_was(shared: Machine) -> None:
    client = shared.client
    worker = client.wait(client.start("sim").workers)[0]
    answer = client.run("sim", "one two", stream=True, max_tokens=40)
    assert next(answer).text
    assert shared.llmos("kill", "-s", "STOP", "sim@1").returncode == 0
    shared.wait_worker("sim@1", "frozen")
    # More than twice the silence after which it would be hung; that long, nothing may happen.
    end = time.monotonic() + 1.0
    while time.monotonic() < end:
        assert shared.worker("sim@1").state == "frozen"
    assert shared.llmos("kill", "-s", "CONT", "sim@1").returncode == 0
    assert sum(1 for _ in answer) >= 39
    after = shared.worker("sim@1")
    assert (after.pid, after.state, after.restarts) == (worker.pid, "ready", worker.restarts)


def test_a_frozen_worker_can_be_stopped(shared: Machine) -> None:
    client = shared.client
    client.wait(client.start("stub").workers)
    client.kill("stub@1", "STOP")
    shared.wait_worker("stub@1", "frozen")
    client.stop("stub", now=True)
    shared.wait_worker("stub@1", "stopped")
    shared.check_processes()


def test_a_silent_host_counts_as_hung_and_is_replaced(shared: Machine) -> None:
    client = shared.client
    before = client.wait(client.start("sim").workers)[0]
    since = max(event.cursor for event in client.events())
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(client.run, "sim", "one two three", max_tokens=25)
        wait_for("running request", lambda: shared.worker("sim@1").slots_used)
        os.kill(before.pid, signal.SIGSTOP)  # behind the daemon's back
        assert answer.result(30).completion_tokens == 25
    check_restart(shared, before, since)
    assert any("hung" in event.message for event in client.events(after=since) if event.subject == "sim@1")

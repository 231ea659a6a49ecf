"""Workers that do not want to end, and workers that cannot: the first are gone in time, whole; the others are said."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from engine_models import ENGINES, command, openai
from machine import Machine, free_port, machine, wait_for
from ordinary import make_ordinary, start
from stuck import is_in_d_state, stuck

from llmos.types import Worker

STOP_S = 1.0
#: The kernel's: from SIGKILL until what is still there counts as unkillable.
KILL_S = 10.0
ONCE = f'[restart]\npolicy = "no"\n[timeouts]\ndrain = "1s"\nstop = "{STOP_S:g}s"\n'
#: An engine with two daemons of its own, each with a child.
TREE = 5


@pytest.fixture(scope="module", params=["cgroup", "marked"])
def shared(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """A daemon whose groups are cgroups, where this user may make any, and one whose groups are found by mark."""
    with machine() as made:
        if request.param == "marked":
            make_ordinary(made)
            start(made)
            assert made.cgroups() == []
        else:
            made.start()
        yield made


def tree_of(machine: Machine, word: str) -> list[psutil.Process]:
    """The stubborn processes that have this word, however they hide."""
    found = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
        except psutil.Error:
            continue  # it ended
        if word in words and any(one.endswith("stubborn.py") for one in words):
            found.append(process)
    return found


@pytest.mark.parametrize("how", ["stop", "kill", "its leader is killed"])
@pytest.mark.parametrize("driver", ["openai", "command"])
def test_a_tree_that_forks_away_ignores_sigterm_and_respawns_is_gone_whole_within_the_deadline(
    shared: Machine, driver: str, how: str
) -> None:
    client, name = shared.client, f"{driver}-{how.split()[0]}"
    word = f"{shared.root}/{name}"
    script = str(ENGINES / "stubborn.py")
    if driver == "openai":
        client.apply(openai(name, "stubborn.py", "{port}", word, rest=ONCE))
    else:
        client.apply(command([sys.executable, "-I", "-S", script, str(free_port()), word], name=name, rest=ONCE))
    worker = client.wait(client.start(name).workers)[0]
    wait_for("whole tree", lambda: len(tree_of(shared, word)) >= TREE)
    since = max(event.cursor for event in client.events())
    if how == "stop":
        client.stop(name)
    elif how == "kill":
        client.kill(name, "KILL")
    else:
        os.kill(worker.pid, signal.SIGKILL)
    shared.wait_worker(worker.name, "stopped", "failed")
    # Down means that nothing of it is left: not now, and not in a moment, when it would have been respawned.
    assert not tree_of(shared, word)
    times = {event.kind: event.time for event in client.events(after=since) if event.subject == worker.name}
    assert "unkillable" not in times
    assert max(times.values()) - times["stopping"] < STOP_S + KILL_S
    shared.check_processes()


def reserved(machine: Machine) -> dict[str, float]:
    return {
        device.id: device.reserved for device in machine.watcher.devices().devices if device.id in ("cpus", "memory")
    }


def test_a_worker_in_d_state_is_unkillable_keeps_its_resources_and_is_stopped_once_it_gets_out(
    a_machine: Machine,
) -> None:
    resources = ONCE + '[resources]\ncpus = 0.25\nmemory = "64M"\n'
    leader, child = stuck(a_machine.root), stuck(a_machine.root)
    # The one's leader is stuck; the other's has ended, and one of its children is.
    a_machine.model(command(leader.argv, name="leader", rest=resources))
    a_machine.model(command(["sh", "-c", '"$@" & wait', "sh", *child.argv], name="child", rest=resources))
    a_machine.start()
    client = a_machine.client
    pids: list[int] = []
    try:
        for model, one in (("leader", leader), ("child", child)):
            worker = client.wait(client.start(model).workers)[0]
            pids.append(wait_for("program", lambda worker=worker: innermost(worker)))
            one.catch(pids[-1])
        client.stop("leader")
        client.stop("child")
        for model in ("leader", "child"):
            worker = a_machine.wait_worker(f"{model}@1", "unkillable")
            assert "stuck in the kernel" in worker.why
        shown = a_machine.llmos("ps")
        assert shown.stdout.count("unkillable") == 2, shown.stdout
        assert all(map(is_in_d_state, pids))
        assert reserved(a_machine) == {"cpus": 0.5, "memory": 128 << 20}
        # Nobody takes its place meanwhile, whatever is asked.
        client.start("leader")
        assert a_machine.worker("leader@1").state == "unkillable"
        client.stop("leader")
    finally:
        leader.release()
        child.release()
    for model in ("leader", "child"):
        assert a_machine.wait_worker(f"{model}@1", "stopped").pid == 0
    assert reserved(a_machine) == {"cpus": 0.0, "memory": 0.0}
    assert not any(Path(f"/proc/{pid}/exe").exists() for pid in pids)
    a_machine.check_processes()
    a_machine.check_cgroups()


def innermost(worker: Worker) -> int:
    """The process of a worker that has no child: the one that gets stuck."""
    children = psutil.Process(worker.pid).children(recursive=True)
    return children[-1].pid if children else worker.pid if worker.name.startswith("leader") else 0

"""A daemon of an ordinary user, who may not make cgroups: groups are found and killed all the same."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

import psutil
import pytest
from engine_models import command, openai, simulated
from machine import Machine, machine, wait_for
from ordinary import NOBODY, make_ordinary, start

from llmos.types import Worker
from llmosd.node.groups import MARK, mark_of
from llmosd.node.marked import MarkedGroup, MarkedGroups
from llmosd.node.records import start_ticks


@pytest.fixture
def users_machine() -> Iterator[Machine]:
    """A machine whose daemon is not root's."""
    with machine() as made:
        make_ordinary(made)
        yield made
        assert not left(made)


def left(users_machine: Machine) -> list[psutil.Process]:
    """The stubborn engine's processes, however they hide."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()  # a zombie has none
            if str(users_machine.root) in words and any(word.endswith("stubborn.py") for word in words):
                found.append(process)
    return found


def test_a_user_gets_the_same_service_without_cgroups(users_machine: Machine) -> None:
    users_machine.model(simulated("sim"))
    users_machine.model(command(["sleep", "1000"], name="plain"))
    start(users_machine)
    client = users_machine.client
    assert client.run("sim", "hello", max_tokens=3).completion_tokens == 3
    worker = client.wait(client.start("plain").workers)[0]
    assert psutil.Process(worker.pid).uids().effective == (os.geteuid() or NOBODY)
    client.kill("plain@1", "STOP")
    wait_for("stopped process", lambda: psutil.Process(worker.pid).status() == psutil.STATUS_STOPPED)
    client.kill("plain@1", "CONT")
    wait_for("running process", lambda: psutil.Process(worker.pid).status() == psutil.STATUS_SLEEPING)
    users_machine.check_processes()


#: It gets one try, so that nothing which the next one starts is taken for what is left of this one.
ONCE = '[restart]\npolicy = "no"\n[timeouts]\nstop = "1s"\n'


def stubborn(users_machine: Machine, *args: str) -> Worker:
    """The engine, two daemons of its own in sessions of their own, and a child of each: all are up."""
    users_machine.model(openai("stubborn", "stubborn.py", "{port}", str(users_machine.root), *args, rest=ONCE))
    start(users_machine)
    client = users_machine.client
    worker = client.wait(client.start("stubborn").workers)[0]
    wait_for("whole tree", lambda: len(left(users_machine)) >= 5)
    return worker


@pytest.mark.parametrize("how", ["llmos kill", "the host is killed", "stop"])
def test_the_kill_of_a_tree_that_forks_away_without_a_mark_and_respawns_is_complete(
    users_machine: Machine, how: str
) -> None:
    worker = stubborn(users_machine)
    if how == "llmos kill":
        users_machine.client.kill("stubborn", "KILL")
    elif how == "stop":
        users_machine.client.stop("stubborn")
    else:
        os.kill(worker.pid, signal.SIGKILL)
    wait_for("end of all of it", lambda: not left(users_machine))
    users_machine.wait_worker("stubborn@1", "stopped", "failed")
    users_machine.check_processes()


def test_what_is_left_of_a_tree_whose_daemon_and_host_were_killed_is_found_by_its_mark(users_machine: Machine) -> None:
    worker = stubborn(users_machine, "keep-environment")
    users_machine.kill()
    os.kill(worker.pid, signal.SIGKILL)
    users_machine.start()
    worker = users_machine.wait_worker("stubborn@1", "failed")
    assert not left(users_machine)
    assert worker.last_exit != "exit code 0"


def test_without_cgroups_too_what_no_record_names_is_ended_before_its_worker_is_started_again(
    users_machine: Machine,
) -> None:
    worker = stubborn(users_machine, "keep-environment")
    users_machine.kill()
    (users_machine.runtime / "workers" / "stubborn@1.json").write_text("{}")
    users_machine.start()
    assert not left(users_machine) and worker.pid not in users_machine.processes()
    users_machine.check_processes()


def test_what_a_worker_of_another_daemon_left_is_no_stray_of_this_one() -> None:
    ours, others = MarkedGroups("llmosd-test-ours"), MarkedGroups("llmosd-test-others")
    mark = mark_of("llmosd-test-ours", "sim@1", 7)
    marked = os.posix_spawn("/bin/sleep", ["sleep", "100"], {MARK: mark}, setsid=True)
    try:
        assert others.unknown(set()) == []
        assert ours.unknown({mark}) == []
        # A new program's environment can be read a moment after it was started.
        ((found, group),) = wait_for("the process", lambda: ours.unknown(set()))
        assert (found, group.members()) == (mark, [marked])
    finally:
        os.kill(marked, signal.SIGKILL)
        os.waitpid(marked, 0)
        ours.close()
        others.close()


def test_a_group_whose_leaders_number_became_a_strangers_is_not_the_strangers() -> None:
    stranger = os.posix_spawn("/bin/sleep", ["sleep", "100"], {}, setsid=True)
    try:
        ticks = start_ticks(stranger)
        assert ticks is not None
        assert MarkedGroup(stranger, ticks, "its own").members() == [stranger]
        assert MarkedGroup(stranger, ticks - 1, "of somebody who had its number").members() == []
        assert MarkedGroup(0, 0, "not born yet").members() == []
    finally:
        os.kill(stranger, signal.SIGKILL)
        os.waitpid(stranger, 0)


def test_a_mark_finds_a_process_that_left_its_session_and_its_parents() -> None:
    mark = "llmosd-test-mark/sim@1-7"
    marked = os.posix_spawn("/bin/sleep", ["sleep", "100"], {MARK: mark}, setsid=True)
    try:
        group = MarkedGroup(2**22 + 1, 1, mark)
        assert group.members() == [marked]
        group.kill()
        os.waitpid(marked, 0)
        assert group.wait_empty(1) and group.members() == []
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(marked, signal.SIGKILL)

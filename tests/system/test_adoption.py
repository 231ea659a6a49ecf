"""Daemons that die, and what the next one makes of the workers they leave."""

from __future__ import annotations

import os
import signal
import sys
import time

import psutil
from engine_models import command, openai, simulated
from machine import Machine, wait_for

from llmos.errors import DaemonUnreachable

#: How a worker ended that was killed while there was no daemon: nobody knows, once init has reaped it.
UNSEEN = ("exit status unknown", "killed by signal 9")


def test_workers_live_on_when_their_daemon_is_killed_and_serve_the_next_one(a_machine: Machine) -> None:
    # Every kind of limit must survive being written down.
    cpu = min(os.sched_getaffinity(0))
    a_machine.model(simulated("sim", limits=f'allowed_cpus = "{cpu}"\nmemory_max = "1G"\nrequest_timeout = "1m"'))
    a_machine.model(openai("stub", "openai_like.py", "--port", "{port}"))
    a_machine.model(command(["sleep", "1000"], name="plain"))
    a_machine.start()
    client = a_machine.client
    for model in ("sim", "stub", "plain"):
        client.wait(client.start(model).workers)
    before = {worker.name: (worker.pid, worker.engine_pid) for worker in client.ps()}
    processes = sorted(a_machine.processes())
    a_machine.kill()
    assert sorted(a_machine.processes()) == processes
    a_machine.start()
    client = a_machine.client
    client.wait(list(before))
    assert {worker.name: worker.pid for worker in client.ps()} == {name: pids[0] for name, pids in before.items()}
    for model in ("sim", "stub"):
        assert client.run(model, "one two", max_tokens=3).completion_tokens == 3
    assert {worker.name: (worker.pid, worker.engine_pid) for worker in client.ps()} == before
    assert sorted(a_machine.processes()) == processes
    # They are the new daemon's in every way: signals, limits, stop, and how they ended.
    client.set_limits("sim@1", {"nice": "7"})
    wait_for("nice value", lambda: os.getpriority(os.PRIO_PROCESS, before["sim@1"][0]) == 7)
    os.kill(before["stub@1"][0], signal.SIGKILL)
    again = a_machine.wait_worker("stub@1", "ready", not_pid=before["stub@1"][0])
    assert again.last_exit.startswith("killed by signal 9")  # though the daemon was not its parent
    client.stop("plain")
    assert a_machine.wait_worker("plain@1", "stopped").pid == 0
    a_machine.check_processes()


def test_a_worker_that_was_being_stopped_is_not_up_again_after_a_crash_of_the_daemon(a_machine: Machine) -> None:
    patient = '[timeouts]\nstop = "60s"\n'
    a_machine.model(command(["sh", "-c", "trap '' TERM; while :; do sleep 0.1; done"], name="slow-end", rest=patient))
    a_machine.start()
    client = a_machine.client
    before = client.wait(client.start("slow-end").workers)[0]
    client.stop("slow-end", now=True)
    a_machine.wait_worker("slow-end@1", "stopping")
    record = a_machine.runtime / "workers" / "slow-end@1.json"
    wait_for("intent on record", lambda: '"stopping":true' in record.read_text())
    a_machine.kill()
    assert psutil.pid_exists(before.pid)
    a_machine.start()
    worker = a_machine.worker("slow-end@1")
    assert (worker.state, worker.pid) == ("stopping", before.pid)
    a_machine.client.kill("slow-end@1", "KILL")
    assert a_machine.wait_worker("slow-end@1", "stopped").pid == 0
    assert not record.exists()


def test_what_is_left_of_a_worker_that_died_without_a_daemon_is_ended(a_machine: Machine) -> None:
    a_machine.model(openai("stubborn", "stubborn.py", "{port}"))
    a_machine.start()
    client = a_machine.client
    before = client.wait(client.start("stubborn").workers)[0]
    tree = [psutil.Process(before.pid), *psutil.Process(before.pid).children(recursive=True)]
    a_machine.kill()
    os.kill(before.pid, signal.SIGKILL)
    wait_for("end of the host", lambda: not _lives(tree[0]))
    a_machine.start()
    # It is started again, as after any failure, once nothing is left of its earlier life.
    after = a_machine.wait_worker("stubborn@1", "ready", not_pid=before.pid)
    assert not any(_lives(process) for process in tree)
    assert after.restarts == 1 and after.last_exit in UNSEEN


def test_a_worker_that_was_stopped_by_an_operator_and_died_without_a_daemon_stays_down(a_machine: Machine) -> None:
    patient = '[restart]\npolicy = "always"\n[timeouts]\ndrain = "60s"\n'
    a_machine.model(simulated("sim", decode_rate=10, rest=patient))
    a_machine.start()
    client = a_machine.client
    before = client.wait(client.start("sim").workers)[0]
    answer = client.run("sim", "never ending", stream=True, max_tokens=1000)
    assert next(answer).text
    client.stop("sim")
    a_machine.wait_worker("sim@1", "draining")
    record = a_machine.runtime / "workers" / "sim@1.json"
    wait_for("intent on record", lambda: '"draining":true' in record.read_text())
    a_machine.kill()
    client.close()  # or its request would come back, and start the worker anew
    os.kill(before.pid, signal.SIGKILL)
    a_machine.start()
    worker = a_machine.wait_worker("sim@1", "stopped")
    assert worker.restarts == 0 and worker.last_exit in UNSEEN
    assert not record.exists()


def test_how_a_worker_ended_that_its_daemon_has_seen_is_known_to_the_next_one(a_machine: Machine) -> None:
    ends = "import os, pathlib, sys, time\nwhile not pathlib.Path(sys.argv[1]).exists(): time.sleep(0.02)\nos._exit(7)"
    sign = a_machine.root / "end"
    a_machine.model(command([sys.executable, "-c", ends, str(sign)], name="plain", rest='[restart]\ndelay = "50ms"\n'))
    a_machine.prepare_failpoint("exit.seen=kill")
    a_machine.start()
    client = a_machine.client
    before = client.wait(client.start("plain").workers)[0]
    a_machine.arm()
    sign.touch()
    assert a_machine.daemon is not None and a_machine.daemon.wait(20) == -signal.SIGKILL
    a_machine.disarm()
    sign.unlink()
    a_machine.start()
    after = a_machine.wait_worker("plain@1", "ready", not_pid=before.pid)
    assert (after.restarts, after.last_exit) == (1, "exit code 7")


def test_a_damaged_record_is_set_aside_and_its_worker_ended_before_it_is_started_again(a_machine: Machine) -> None:
    a_machine.model(simulated("sim"))
    a_machine.model(simulated("other"))
    a_machine.start()
    client = a_machine.client
    before = client.wait([*client.start("sim").workers, *client.start("other").workers])
    pids = {worker.name: worker.pid for worker in before}
    stranger = psutil.Process(pids["sim@1"])
    a_machine.kill()
    record = a_machine.runtime / "workers" / "sim@1.json"
    record.write_bytes(record.read_bytes()[:100])
    a_machine.start()
    assert record.with_suffix(".damaged").exists() and not record.exists()
    warned = [event for event in a_machine.client.events() if event.kind == "warning"]
    assert any("was set aside" in event.message and event.subject == "sim@1" for event in warned)
    # Its cgroup says whose it is, or its mark; there are never two of it.
    assert not _lives(stranger)
    assert any(str(pids["sim@1"]) in event.message and "on no record" in event.message for event in warned)
    assert a_machine.client.run("sim", "hello", max_tokens=1).completion_tokens == 1
    assert a_machine.worker("sim@1").pid != pids["sim@1"]
    assert a_machine.worker("other@1").pid == pids["other@1"]
    a_machine.check_processes()


def test_a_worker_whose_model_file_went_or_changed_meanwhile_is_ended_or_replaced(a_machine: Machine) -> None:
    for model in ("goes", "changes", "stays"):
        a_machine.model(simulated(model))
    a_machine.start()
    client = a_machine.client
    before = {model: client.wait(client.start(model).workers)[0].pid for model in ("goes", "changes", "stays")}
    goes = psutil.Process(before["goes"])
    a_machine.kill()
    (a_machine.models / "goes.toml").unlink()
    a_machine.model(simulated("changes", decode_rate=50))
    a_machine.start()
    assert a_machine.wait_worker("changes@1", "ready", not_pid=before["changes"]).pid
    wait_for("end of the one", lambda: not _lives(goes))
    wait_for("forgotten model", lambda: {m.name for m in a_machine.client.models()} == {"changes", "stays"})
    assert a_machine.wait_worker("stays@1", "ready").pid == before["stays"]


def test_without_a_daemon_workers_end_with_all_they_forked_after_the_orphan_timeout(a_machine: Machine) -> None:
    a_machine.configure('[node]\norphan_timeout = "500ms"\n')
    a_machine.model(openai("stubborn", "stubborn.py", "{port}"))
    a_machine.start()
    client = a_machine.client
    pid = client.wait(client.start("stubborn").workers)[0].pid
    tree = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    a_machine.kill()
    wait_for("end of them all", lambda: not any(_lives(process) for process in tree))
    assert a_machine.processes() == []
    # It was wanted, and its policy is to come back when it fails: nobody told it to end.
    a_machine.start()
    wait_for("restart with the reason", lambda: any("no daemon for" in e.message for e in a_machine.client.events()))
    assert a_machine.wait_worker("stubborn@1", "ready", not_pid=pid).restarts == 1


def test_a_second_daemon_on_the_same_runtime_directory_is_refused(a_machine: Machine) -> None:
    a_machine.model(simulated("sim"))
    a_machine.start()
    first = a_machine.daemon
    assert first is not None
    a_machine.start(expect_failure=True)
    second = a_machine.daemon
    assert second is not None and second.wait(20) == 1
    a_machine.daemon = first
    assert f"another llmosd (pid {first.pid}) has {a_machine.runtime}" in a_machine.log()
    # And took nothing away: not the sockets, not the answers.
    assert a_machine.client.run("sim", "hello", max_tokens=1).completion_tokens == 1
    assert a_machine.client.status().pid == first.pid


def test_sigterm_ends_all_workers_in_time_whatever_they_ignore(a_machine: Machine) -> None:
    a_machine.model(openai("stubborn", "stubborn.py", "{port}"))
    a_machine.model(simulated("sim", decode_rate=1))
    a_machine.model(command(["sh", "-c", "trap '' TERM; while :; do sleep 0.1; done"], name="plain"))
    a_machine.start()
    client = a_machine.client
    for model in ("stubborn", "sim", "plain"):
        client.wait(client.start(model).workers)
    answer = client.run("sim", "never ending", stream=True, max_tokens=1000)
    assert next(answer).text
    tree = [psutil.Process(pid) for pid in a_machine.processes()]
    began = time.monotonic()
    assert a_machine.stop() == 0
    # 1 s to drain, 1 s from SIGTERM to SIGKILL, and what a busy machine takes.
    assert time.monotonic() - began < 10
    assert not any(_lives(process) for process in tree)
    assert a_machine.sockets() == []
    assert list((a_machine.runtime / "workers").iterdir()) == []
    assert "live on" not in a_machine.log()
    try:
        a_machine.client.status()
    except DaemonUnreachable:
        return
    raise AssertionError("somebody answers")


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_client_that_comes_back_before_a_new_daemon_knows_its_models_is_not_refused(a_machine: Machine) -> None:
    a_machine.model(simulated("sim", decode_rate=50))
    a_machine.prepare_failpoint("models.read=delay(1500)")
    a_machine.start()
    client = a_machine.client
    client.wait(client.start("sim").workers)
    pieces = iter(client.run("sim", "one two three", stream=True, max_tokens=150, timeout=60))
    text = next(pieces).text
    a_machine.kill()
    a_machine.arm()
    a_machine.start()
    text += "".join(piece.text for piece in pieces)
    assert text == client.run("sim", "one two three", max_tokens=150).text

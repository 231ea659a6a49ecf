"""Commands that are asked whether they are ready and whether they live: by HTTP and by what they print."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_models import ENGINES, command
from machine import Machine, free_port, machine, wait_for

from llmos.types import Worker

#: Waits for its file, and says that it listens when it is there.
PATIENT = 'echo warming up; until [ -e "$GATE" ]; do sleep 0.02; done; {says}; exec sleep 1000'
#: Seconds in which one that hangs is found to.
HUNG_S = 0.5 + 1 * 2
LIVENESS = 'interval = "500ms"\ntimeout = "1s"\nfailures = 2\n'


@pytest.fixture(scope="module")
def shared() -> Iterator[Machine]:
    """One daemon for those tests here that do not kill it: each uses models of its own."""
    with machine() as made:
        made.configure('[logs]\nmax_size = "64K"')
        made.start()
        yield made


def rest(probes: str = "", *, load: str = "20s", delay: str = "200ms") -> str:
    restart = f'[restart]\npolicy = "always"\ndelay = "{delay}"\nburst = 0\n'
    return f'{restart}[timeouts]\nload = "{load}"\nstop = "1s"\n{probes}'


def served(name: str, port: int, says: Path, *, liveness: str = "", delay: str = "200ms") -> str:
    """asked.py, with questions on readiness and, if wanted, liveness."""
    url = f"http://127.0.0.1:{port}/health"
    probes = f'[ready]\nhttp = "{url}"\n' + (f'[liveness]\nhttp = "{url}"\n{liveness}' if liveness else "")
    argv = [sys.executable, str(ENGINES / "asked.py"), str(port), str(says)]
    return command(argv, name=name, rest=rest(probes, delay=delay))


def printing(name: str, gate: Path, says: str = "echo listening on 8080", *, log: str = "^listening on [0-9]+$") -> str:
    """A shell that prints, with an expression that is to be found."""
    script = PATIENT.replace("{says}", says)
    return command(
        ["sh", "-c", script], name=name, engine=f'env = {{ GATE = "{gate}" }}', rest=rest(f"[ready]\nlog = '{log}'\n")
    )


def begin(machine: Machine, text: str) -> str:
    """Apply and start a model; its worker's name."""
    machine.client.apply(text)
    model = text.split('model = "', 1)[1].split('"', 1)[0]
    machine.client.start(model)
    return f"{model}@1"


def wait_why(machine: Machine, worker: str, words: str) -> Worker:
    """Wait until `ps` gives this reason while it loads."""

    def look() -> Worker | None:
        found = machine.worker(worker)
        return found if found.state == "loading" and words in found.why else None

    return wait_for(f"{worker} that loads because of {words!r}", look)


def same_for(machine: Machine, worker: str, state: str, seconds: float) -> None:
    """It stays as it is, all this time."""
    before, end = machine.worker(worker), time.monotonic() + seconds
    while time.monotonic() < end:
        now = machine.worker(worker)
        assert (now.state, now.pid, now.restarts) == (state, before.pid, before.restarts), now.why
        time.sleep(0.05)


# -- readiness --------------------------------------------------------------------------------------------------------


def test_a_command_is_ready_when_its_url_answers_2xx_and_says_till_then_what_it_waits_for(
    shared: Machine, tmp_path: Path
) -> None:
    says, port = tmp_path / "says", free_port()
    worker = begin(shared, served("web", port, says))
    wait_why(shared, worker, f"http://127.0.0.1:{port}/health answers 503")
    says.write_text("302")
    wait_why(shared, worker, "answers 302")
    says.write_text("drip")
    assert shared.wait_worker(worker, "ready").restarts == 0
    shared.client.remove("web")


def test_a_command_that_does_not_listen_yet_says_so(shared: Machine) -> None:
    port = free_port()
    text = command(["sleep", "1000"], name="deaf", rest=rest(f'[ready]\nhttp = "http://localhost:{port}/"\n'))
    worker = begin(shared, text)
    wait_why(shared, worker, f"no answer on http://localhost:{port}/: Connection refused")
    shared.client.remove("deaf")


def test_a_command_is_ready_when_it_prints_its_line_and_never_by_that_of_an_earlier_life(
    shared: Machine, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    worker = begin(shared, printing("talker", gate))
    wait_why(shared, worker, "waits for a line with ^listening on")
    gate.touch()
    before = shared.wait_worker(worker, "ready")
    gate.unlink()
    os.kill(before.pid, signal.SIGKILL)
    after = wait_why(shared, worker, "waits for a line with ^listening on")
    assert after.pid != before.pid
    gate.touch()
    assert shared.wait_worker(worker, "ready").pid == after.pid
    shared.client.remove("talker")


def test_a_line_is_found_though_the_log_is_rotated_under_it(shared: Machine, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    flood = "i=0; while [ $i -lt 40 ]; do head -c 1000 /dev/zero | tr '\\0' '\\n'; i=$((i+1)); sleep 0.01; done"
    worker = begin(shared, printing("flooding", gate, f"{flood}; echo listening on 8080; {flood}"))
    wait_why(shared, worker, "waits for a line")
    gate.touch()
    assert shared.wait_worker(worker, "ready").restarts == 0
    log = shared.root / "log" / "flooding@1.log"
    wait_for("rotated log", lambda: log.with_name(log.name + ".1").exists())
    shared.client.remove("flooding")


def test_a_line_is_found_though_the_log_was_rotated_away(shared: Machine, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    worker = begin(shared, printing("rotated", gate))
    wait_why(shared, worker, "waits for a line")
    log = shared.root / "log" / "rotated@1.log"
    log.rename(log.with_name(log.name + ".1"))
    log.touch()
    gate.touch()
    assert shared.wait_worker(worker, "ready").restarts == 0
    shared.client.remove("rotated")


def test_with_both_checks_the_line_comes_first_and_then_the_url(shared: Machine, tmp_path: Path) -> None:
    says, port = tmp_path / "says", free_port()
    text = served("both", port, says).replace("[ready]", "[ready]\nlog = 'serves'")
    worker = begin(shared, text)
    wait_why(shared, worker, "answers 503")
    says.write_text("204")
    shared.wait_worker(worker, "ready")
    shared.client.remove("both")


def test_a_command_may_load_for_long_while_it_prints_and_not_while_it_is_silent(
    shared: Machine, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    script = "i=0; while [ $i -lt 30 ]; do printf .; sleep 0.1; i=$((i+1)); done; echo; echo done; exec sleep 1000"
    slow = command(["sh", "-c", script], name="slow", rest=rest("[ready]\nlog = '^done$'\n", load="1s"))
    began = time.monotonic()
    worker = begin(shared, slow)
    assert shared.wait_worker(worker, "ready").restarts == 0
    assert time.monotonic() - began > 2
    silent = printing("silent", gate).replace('load = "20s"', 'load = "1s"').replace('"200ms"', '"30s"')
    worker = begin(shared, silent)
    why = shared.wait_worker(worker, "backoff").why
    assert why == "no progress in 1s while loading: waits for a line with ^listening on [0-9]+$"
    for name in ("slow", "silent"):
        shared.client.remove(name)


def test_an_expression_that_backtracks_without_end_costs_its_worker_and_not_the_daemon(
    shared: Machine, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    says = "head -c 3000 /dev/zero | tr '\\0' a; echo b"
    worker = begin(shared, printing("hostile", gate, says, log="^(a+)+$").replace('"200ms"', '"30s"'))
    wait_why(shared, worker, "waits for a line")
    gate.touch()
    longest = 0.0

    def ended() -> bool:
        nonlocal longest
        began = time.monotonic()
        state = shared.worker(worker).state
        longest = max(longest, time.monotonic() - began)
        return state == "backoff"

    wait_for("end of it", ended)
    assert "ready.log takes too long" in shared.worker(worker).why
    assert longest < 5, "the daemon stood still"
    shared.client.remove("hostile")


def test_a_line_without_end_hides_nothing_of_what_comes_after_it(shared: Machine, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    says = "head -c 300000 /dev/zero | tr '\\0' a; echo; echo listening on 1"
    worker = begin(shared, printing("endless", gate, says))
    gate.touch()
    shared.wait_worker(worker, "ready")
    shared.client.remove("endless")


# -- liveness ---------------------------------------------------------------------------------------------------------


def test_a_command_that_hangs_is_killed_and_says_so(shared: Machine, tmp_path: Path) -> None:
    says, port = tmp_path / "says", free_port()
    says.write_text("200")
    worker = begin(shared, served("hanging", port, says, liveness=LIVENESS, delay="30s"))
    before = shared.wait_worker(worker, "ready")
    os.kill(before.pid, signal.SIGSTOP)
    hung = shared.wait_worker(worker, "backoff")
    url = f"http://127.0.0.1:{port}/health"
    assert hung.why == f"hung: no answer on {url} in 1s, 2 times in a row"
    assert url in shared.llmos("ps").stdout
    shared.client.start("hanging")
    shared.wait_worker(worker, "ready", not_pid=before.pid)
    says.write_text("500")
    assert shared.wait_worker(worker, "backoff").why == f"hung: {url} answers 500, 2 times in a row"
    shared.client.remove("hanging")


def test_a_command_that_is_frozen_is_not_hung_and_is_asked_again_once_it_thaws(shared: Machine, tmp_path: Path) -> None:
    says, port = tmp_path / "says", free_port()
    says.write_text("200")
    worker = begin(shared, served("frozen", port, says, liveness=LIVENESS))
    before = shared.wait_worker(worker, "ready")
    shared.client.kill(worker, signal.SIGSTOP)
    shared.wait_worker(worker, "frozen")
    same_for(shared, worker, "frozen", HUNG_S * 1.2)
    shared.client.kill(worker, signal.SIGCONT)
    shared.wait_worker(worker, "ready")
    same_for(shared, worker, "ready", HUNG_S * 1.2)
    os.kill(before.pid, signal.SIGSTOP)
    shared.wait_worker(worker, "ready", not_pid=before.pid)
    shared.client.remove("frozen")


# -- a new daemon -----------------------------------------------------------------------------------------------------


def kinds(machine: Machine, worker: str) -> list[str]:
    """What this daemon saw the worker become."""
    return [event.kind for event in machine.client.events() if event.subject == worker]


def test_a_new_daemon_waits_on_for_who_was_not_ready(a_machine: Machine, tmp_path: Path) -> None:
    gate, says, port = tmp_path / "gate", tmp_path / "says", free_port()
    a_machine.model(printing("talker", gate))
    a_machine.model(served("web", port, says))
    a_machine.start()
    for model in ("talker", "web"):
        a_machine.client.start(model)
    talker = wait_why(a_machine, "talker@1", "waits for a line")
    web = wait_why(a_machine, "web@1", "answers 503")
    a_machine.kill()
    gate.touch()  # and its line is printed while there is nobody to read it
    wait_for("line", lambda: "listening" in (a_machine.root / "log" / "talker@1.log").read_text())
    a_machine.start()
    assert a_machine.wait_worker("talker@1", "ready").pid == talker.pid
    assert wait_why(a_machine, "web@1", "answers 503").pid == web.pid
    says.write_text("200")
    assert a_machine.wait_worker("web@1", "ready").pid == web.pid


def test_a_new_daemon_knows_who_was_ready_and_who_is_frozen_and_finds_who_hangs(
    a_machine: Machine, tmp_path: Path
) -> None:
    gate, says = tmp_path / "gate", tmp_path / "says"
    gate.touch()
    says.write_text("200")
    a_machine.model(printing("talker", gate))
    for model in ("well", "frozen", "hanging"):
        a_machine.model(served(model, free_port(), says, liveness=LIVENESS, delay="30s"))
    a_machine.start()
    names = {model: f"{model}@1" for model in ("talker", "well", "frozen", "hanging")}
    for model in names:
        a_machine.client.start(model)
    before = {model: a_machine.wait_worker(name, "ready") for model, name in names.items()}
    a_machine.client.kill("frozen@1", signal.SIGSTOP)
    a_machine.wait_worker("frozen@1", "frozen")
    (a_machine.root / "log" / "talker@1.log").write_text("")  # its line is nowhere any more
    a_machine.kill()
    os.kill(before["hanging"].pid, signal.SIGSTOP)
    a_machine.start()
    # Without a freezer, one that is found stopped cannot be told from one that was frozen on request.
    hanging = a_machine.wait_worker("hanging@1", "backoff", "frozen")
    assert "hung: no answer" in hanging.why or hanging.pid == before["hanging"].pid
    for model in ("talker", "well"):
        assert a_machine.wait_worker(names[model], "ready").pid == before[model].pid
        assert "loading" not in kinds(a_machine, names[model])
    same_for(a_machine, "frozen@1", "frozen", HUNG_S * 1.2)
    a_machine.client.kill("frozen@1", signal.SIGCONT)
    same_for(a_machine, "frozen@1", "ready", HUNG_S * 1.2)
    os.kill(before["well"].pid, signal.SIGSTOP)
    assert "hung: no answer" in a_machine.wait_worker("well@1", "backoff").why


def test_a_command_is_ready_for_the_next_daemon_though_this_one_died_before_it_knew(
    a_machine: Machine, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    a_machine.model(printing("talker", gate))
    a_machine.prepare_failpoint("ready.recorded=kill")
    a_machine.start()
    a_machine.client.start("talker")
    before = wait_why(a_machine, "talker@1", "waits for a line")
    a_machine.arm()
    gate.touch()
    assert a_machine.daemon is not None
    a_machine.daemon.wait(30)
    a_machine.disarm()
    a_machine.start()
    assert a_machine.wait_worker("talker@1", "ready").pid == before.pid
    assert "loading" not in kinds(a_machine, "talker@1")


# -- the gateway ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("listen", ["127.0.0.1", "[::1]", "localhost"])
def test_the_gateway_is_ready_when_it_serves_and_stays_the_same_under_a_new_daemon(
    a_machine: Machine, listen: str
) -> None:
    if listen == "[::1]" and not Path("/proc/net/if_inet6").exists():
        pytest.skip("needs IPv6")
    a_machine.configure()
    toml = a_machine.root / "etc" / "llmosd.toml"
    toml.write_text(f'[gateway]\nlisten = "{listen}:{free_port()}"\n')
    a_machine.start()
    before = a_machine.wait_worker("gateway@1", "ready")
    seen = kinds(a_machine, "gateway@1")
    assert seen.index("loading") < seen.index("ready")
    a_machine.kill()
    a_machine.start()
    assert a_machine.wait_worker("gateway@1", "ready").pid == before.pid


def test_a_gateway_on_a_port_that_is_not_known_before_is_not_asked(a_machine: Machine) -> None:
    (a_machine.root / "etc" / "llmosd.toml").write_text('[gateway]\nlisten = "127.0.0.1:0"\n')
    a_machine.start()
    a_machine.wait_worker("gateway@1", "ready")

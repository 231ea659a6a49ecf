"""Engines that do not work: each worker says why, and the daemon and its neighbours go on."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator

import psutil
import pytest
from engine_models import ENGINES, SHORT, command, gemma, openai, served_by, simulated
from machine import Machine, machine, wait_for

from llmos.errors import Refused, Unavailable

LOG_MAX = 1 << 20
SOON = """
[restart]
delay = "50ms"
delay_max = "50ms"
burst = 3
[timeouts]
start = "20s"
load = "1s"
drain = "1s"
stop = "1s"
"""


@pytest.fixture(scope="module")
def shared() -> Iterator[Machine]:
    with machine() as made:
        made.configure(f'[logs]\nmax_size = "{LOG_MAX}"\n')
        made.start()
        yield made


def check_failed(shared: Machine, model: str, *reasons: str) -> None:
    """It has failed: `ps` says why, a request is told as well, `logs` has what the engine said, and reset helps."""
    client = shared.client
    client.start(model)
    name = f"{model}@1"
    worker = shared.wait_worker(name, "failed")
    assert all(reason in worker.why for reason in reasons), worker.why
    assert worker.pid == 0
    shown = shared.llmos("ps", "-a")
    assert "failed" in shown.stdout and reasons[0][:20] in shown.stdout, shown.stdout
    shared.check_processes()


def request_is_told(shared: Machine, model: str, *reasons: str) -> None:
    with pytest.raises(Unavailable) as told:
        shared.client.run(model, "hello", timeout=20)
    assert all(reason in str(told.value) for reason in reasons), str(told.value)
    assert f"llmos reset {model}" in str(told.value)


def test_weights_that_do_not_exist_are_named_with_every_place_that_was_looked_at(shared: Machine) -> None:
    shared.client.apply(gemma("no-such.gguf", name="weightless", rest=SOON))  # type: ignore[arg-type]
    check_failed(shared, "weightless", "there are no weights 'no-such.gguf'", str(shared.models / "no-such.gguf"))
    request_is_told(shared, "weightless", "there are no weights")


def test_weights_that_are_no_gguf_are_refused_by_name(shared: Machine) -> None:
    (shared.models / "text.gguf").write_text("not a model at all")
    shared.client.apply(gemma("text.gguf", name="no-gguf", rest=SOON))  # type: ignore[arg-type]
    check_failed(shared, "no-gguf", "text.gguf is not a GGUF file")


def test_a_damaged_gguf_fails_with_what_llama_cpp_said_of_it(shared: Machine) -> None:
    pytest.importorskip("xllamacpp")
    (shared.models / "damaged.gguf").write_bytes(b"GGUF" + bytes(range(256)) * 16)
    shared.client.apply(gemma("damaged.gguf", name="damaged", rest=SOON))  # type: ignore[arg-type]
    check_failed(shared, "damaged", "the engine exited with code 1")
    assert any("damaged.gguf" in line for line in shared.client.logs("damaged@1"))


@pytest.mark.parametrize("driver", ["openai", "command"])
def test_a_command_that_is_not_found_fails_with_that_reason(shared: Machine, driver: str) -> None:
    make = served_by if driver == "openai" else command
    shared.client.apply(make(["/no/such/engine", "--port", "{port}"], name=f"absent-{driver}", rest=SOON))
    check_failed(shared, f"absent-{driver}", "cannot run /no/such/engine: No such file or directory")


def test_a_command_that_may_not_be_run_fails_with_that_reason(shared: Machine) -> None:
    shared.client.apply(command([str(ENGINES / "crashing.py")], name="forbidden", rest=SOON))
    check_failed(shared, "forbidden", "cannot run", "Permission denied")


def test_an_engine_whose_port_is_taken_fails_with_its_own_last_words(shared: Machine) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        shared.client.apply(openai("port-taken", "openai_like.py", "--port", port, rest=SOON))
        check_failed(shared, "port-taken", "the engine exited with code 1", "Address already in use")


def test_an_engine_that_exits_at_once_is_retried_and_then_given_up_with_its_last_words(shared: Machine) -> None:
    client = shared.client
    client.apply(openai("crashing", "crashing.py", rest=SOON))
    since = max((event.cursor for event in client.events()), default=0)
    check_failed(shared, "crashing", "3 starts", "exited with code 3", "the flux capacitor is broken")
    kinds = [event.kind for event in client.events(after=since) if event.subject == "crashing@1"]
    assert kinds.count("starting") == 3 and kinds.count("backoff") == 2
    lines = list(client.logs("crashing@1"))
    assert lines.count("tries to load the weights") == 3
    request_is_told(shared, "crashing", "the flux capacitor is broken")
    client.reset("crashing")
    assert shared.worker("crashing@1").state != "failed"


def test_a_crashing_engine_shows_backoff_with_the_reason_between_two_starts(shared: Machine) -> None:
    client = shared.client
    client.apply(openai("waiting", "crashing.py", rest='[restart]\ndelay = "20s"\n'))
    client.start("waiting")
    worker = shared.wait_worker("waiting@1", "backoff")
    assert "the flux capacitor is broken" in worker.why
    client.stop("waiting")
    shared.wait_worker("waiting@1", "stopped")


def test_an_engine_that_never_gets_ready_is_ended_and_says_so(shared: Machine) -> None:
    shared.client.apply(openai("never", "never_ready.py", rest=SOON.replace("burst = 3", "burst = 1")))
    check_failed(shared, "never", "no progress in 1s while loading")
    assert "still compiling kernels" in list(shared.client.logs("never@1"))


def test_a_host_that_never_says_hello_is_ended_and_says_so(shared: Machine) -> None:
    rest = SOON.replace('start = "20s"', 'start = "1ms"').replace("burst = 3", "burst = 1")
    shared.client.apply(simulated("mute", rest=rest))
    check_failed(shared, "mute", "no progress in 1ms while starting")


def test_an_engine_that_prints_a_gigabyte_costs_a_capped_log_and_nothing_else(shared: Machine) -> None:
    client = shared.client
    client.apply(openai("loud", "openai_like.py", "--port", "{port}", "--print-bytes", str(1 << 30)))
    client.start("loud")
    worker = shared.wait_worker("loud@1", "ready")
    # It is still printing, and is answered all the same.
    assert client.run("loud", "are you there", max_tokens=2, timeout=20).text == " w0 w1"
    wait_for("end of the printing", lambda: "printed it all" in list(client.logs("loud@1", lines=5)), 60)
    logs = [path.stat().st_size for path in (shared.root / "log").glob("loud@1.log*")]
    assert len(logs) == 2 and sum(logs) <= LOG_MAX
    for pid in (worker.pid, client.status().pid):
        assert psutil.Process(pid).memory_info().rss < 200 << 20
    assert shared.worker("loud@1").restarts == 0
    client.stop("loud")
    shared.wait_worker("loud@1", "stopped")


def test_a_command_that_prints_a_gigabyte_has_a_capped_log_when_it_has_ended(shared: Machine) -> None:
    client = shared.client
    script = "import os\nfor _ in range(1 << 10): os.write(1, b'x' * (1 << 16))"
    client.apply(command([sys.executable, "-c", script], name="loud-command", rest='[restart]\npolicy = "no"\n'))
    client.start("loud-command")
    shared.wait_worker("loud-command@1", "stopped")
    wait_for(
        "capped log",
        lambda: sum(path.stat().st_size for path in (shared.root / "log").glob("loud-command@1.log*")) <= LOG_MAX,
    )


def test_an_engine_that_ignores_sigterm_and_forks_away_is_gone_when_its_worker_is_stopped(shared: Machine) -> None:
    client = shared.client
    client.apply(openai("stubborn", "stubborn.py", "{port}"))
    client.start("stubborn")
    worker = shared.wait_worker("stubborn@1", "ready")
    tree = psutil.Process(worker.pid).children(recursive=True)
    wait_for("daemons of its own", lambda: len(psutil.Process(worker.pid).children(recursive=True)) >= 5)
    tree = psutil.Process(worker.pid).children(recursive=True)
    client.stop("stubborn")
    shared.wait_worker("stubborn@1", "stopped")
    assert not any(process.is_running() for process in tree)
    shared.check_processes()


def test_a_model_whose_reservation_never_fits_is_refused_with_the_figures(shared: Machine) -> None:
    client = shared.client
    client.apply(simulated("huge", rest=SHORT + '[resources]\nmemory = "900T"\n'))
    with pytest.raises(Refused, match="900T"):
        client.start("huge")
    with pytest.raises(Unavailable, match="cannot be started on this machine"):
        client.run("huge", "hello", timeout=20)


def test_the_others_are_served_all_the_while(shared: Machine) -> None:
    shared.client.apply(simulated("neighbour"))
    assert shared.client.run("neighbour", "hello", max_tokens=2).completion_tokens == 2

"""Model files and settings that are wrong: each is refused with its reason, and what runs goes on."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from engine_models import simulated
from machine import Machine, free_port, wait_for

from llmos.errors import Invalid, NotFound, Refused


def hang_up(a_machine: Machine) -> None:
    """SIGHUP, and wait until the files were read again."""
    assert a_machine.daemon is not None
    before = a_machine.log().count("reloaded:")
    a_machine.daemon.send_signal(signal.SIGHUP)
    wait_for("end of the reload", lambda: a_machine.log().count("reloaded:") > before)


def test_a_bad_file_on_reload_is_refused_with_line_and_reason_and_the_running_set_stays(a_machine: Machine) -> None:
    for name in ("stays", "breaks", "goes"):
        a_machine.model(simulated(name))
    a_machine.start()
    client = a_machine.client
    pids = {name: client.wait(client.start(name).workers)[0].pid for name in ("stays", "breaks", "goes")}
    a_machine.model(simulated("breaks").replace("decode_rate", "decode_rat"))
    a_machine.model('model = "no-toml"\n[engine\n')
    a_machine.model(simulated("comes"))
    (a_machine.models / "goes.toml").unlink()
    hang_up(a_machine)
    log = a_machine.log()
    assert (
        f"refused: {a_machine.models}/breaks.toml: unknown key 'engine.decode_rat'; did you mean 'decode_rate'?" in log
    )
    assert f"refused: {a_machine.models}/no-toml.toml: not valid TOML" in log and "line 2" in log
    # What was removed is stopped, what is new can be used, and the rest has noticed nothing.
    wait_for("forgotten model", lambda: {m.name for m in client.models()} == {"stays", "breaks", "comes"})
    assert client.run("comes", "hello", max_tokens=1).completion_tokens == 1
    for name in ("stays", "breaks"):
        assert client.run(name, "hello", max_tokens=1).completion_tokens == 1
        assert a_machine.worker(f"{name}@1").pid == pids[name]
    with pytest.raises(NotFound, match="no model 'goes'"):
        client.run("goes", "hello")
    a_machine.check_processes()
    # By the control plane the same is said to whoever asked.
    refused = client.reload().refused
    assert len(refused) == 2 and any("did you mean 'decode_rate'" in line for line in refused)


def test_a_reload_changes_what_runs_to_what_the_files_say(a_machine: Machine) -> None:
    a_machine.model(simulated("sim", slots=2))
    a_machine.start()
    client = a_machine.client
    before = client.wait(client.start("sim").workers)[0]
    a_machine.model(simulated("sim", slots=3))
    hang_up(a_machine)
    assert (a_machine.worker("sim@1").slots, a_machine.worker("sim@1").pid) == (3, before.pid)
    a_machine.model(simulated("sim", slots=3, decode_rate=77))
    hang_up(a_machine)
    a_machine.wait_worker("sim@1", "ready", not_pid=before.pid)
    hang_up(a_machine)
    assert a_machine.worker("sim@1").restarts == 1


BAD_FILES = {
    "unknown key": ('colour = "red"\n', "unknown key 'colour'"),
    "a key that is nearly right": ("[limits]\nslotz = 2\n", "unknown key 'limits.slotz'; did you mean 'slots'"),
    "wrong type": ('[limits]\nslots = "many"\n', "limits.slots: expected a whole number from 1 to 4096, got 'many'"),
    "wrong unit": ('[limits]\nmemory_max = "3 parsecs"\n', "limits.memory_max"),
    "out of range": ("[limits]\nslots = 0\n", "limits.slots: expected a whole number from 1 to 4096, got 0"),
    "negative time": ('[scale]\nidle_timeout = "-5s"\n', "scale.idle_timeout"),
    "more wanted than allowed": ("[scale]\nmin = 3\nmax = 2\n", "scale.max: 2 is less than scale.min, 3"),
    "a limit that nobody here can hold": ('[limits]\ngpu_memory_max = "1G"\n', "limits: gpu_memory_max"),
    "a name for nothing": ('aliases = ["sim"]\n', "'sim' is the model's own name"),
    "no TOML": ("[limits\n", "not valid TOML"),
}


def test_every_wrong_model_file_is_refused_with_what_is_wrong_and_nothing_is_kept(a_machine: Machine) -> None:
    a_machine.start()
    client = a_machine.client
    for what, (text, reason) in BAD_FILES.items():
        whole = f'model = "sim"\n{text}'
        engine = '\n[engine]\ndriver = "simulated"\n'
        with pytest.raises(Refused) as refused:
            client.apply(whole + engine, file_name="mine.toml")
        assert reason in str(refused.value), f"{what}: {refused.value}"
    with pytest.raises(Invalid, match="is kept for llmosd's own service"):
        client.apply('model = "gateway"\n[engine]\ndriver = "simulated"\n')
    with pytest.raises(Invalid, match=r"engine.driver: expected one of .*llamacpp.*, got 'lama'"):
        client.apply('model = "sim"\n[engine]\ndriver = "lama"\n')
    assert client.models() == () and list(a_machine.models.iterdir()) == []


def run_daemon(a_machine: Machine, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llmosd", "--root", str(a_machine.root), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False, cwd="/")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[gatway]\n", "unknown key 'gatway'; did you mean 'gateway'?"),
        ('[logs]\nmax_size = "big"\n', "logs.max_size"),
        ('[gateway]\nlisten = "0.0.0.0:8484"\n', "can be reached from outside this machine, which needs TLS"),
        ("[scheduler]\nwindow = 1\n", "scheduler.window: expected a whole number from 2 to 65536, got 1"),
        ("this is = = not TOML", "not valid TOML"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_started(a_machine: Machine, text: str, reason: str) -> None:
    (a_machine.root / "etc" / "llmosd.toml").write_text(text)
    ended = run_daemon(a_machine)
    assert ended.returncode == 1
    assert "llmosd.toml" in ended.stderr and reason in ended.stderr and "Traceback" not in ended.stderr
    assert a_machine.sockets() == []


def test_a_runtime_directory_too_long_for_sockets_is_refused_with_what_to_do(a_machine: Machine) -> None:
    ended = run_daemon(a_machine, "--runtime-dir", str(Path("/tmp", "x" * 120)))
    assert ended.returncode == 1 and "--runtime-dir" in ended.stderr and "Traceback" not in ended.stderr


def test_a_port_of_the_gateway_that_is_taken_is_refused_by_name(a_machine: Machine) -> None:
    port = free_port()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        (a_machine.root / "etc" / "llmosd.toml").write_text(f'[gateway]\nlisten = "127.0.0.1:{port}"\n')
        ended = run_daemon(a_machine)
    assert ended.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in ended.stderr and "Traceback" not in ended.stderr

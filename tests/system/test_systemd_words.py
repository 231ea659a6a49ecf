"""What the daemon says to systemd, and takes from it: with a real notify socket and systemd's own activation tool."""

from __future__ import annotations

import importlib.util
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from machine import DEADLINE_S, SIMULATED, Machine, free_port, wait_for

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("systemd") is None, reason="needs systemd-python: pip install llmosd[systemd]"
)


@pytest.fixture
def notify_socket(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(DEADLINE_S)
        yield listener


def words(listener: socket.socket, wanted: str) -> str:
    """Receive until a message has `wanted` in it."""
    while True:
        message = listener.recv(4096).decode()
        if wanted in message.splitlines():
            return message


def test_systemd_is_told_of_readiness_of_life_and_of_the_end(
    a_machine: Machine, notify_socket: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", notify_socket.getsockname())
    monkeypatch.setenv("WATCHDOG_USEC", "200000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    a_machine.model(SIMULATED)
    a_machine.start()
    assert "STATUS=serving 1 models" in words(notify_socket, "READY=1")
    words(notify_socket, "WATCHDOG=1")
    words(notify_socket, "WATCHDOG=1")
    assert a_machine.daemon is not None
    a_machine.daemon.send_signal(signal.SIGHUP)
    words(notify_socket, "RELOADING=1")
    words(notify_socket, "READY=1")
    assert a_machine.stop() == 0
    words(notify_socket, "STOPPING=1")


def test_sockets_that_systemd_opened_are_served(a_machine: Machine) -> None:
    activate = shutil.which("systemd-socket-activate")
    if activate is None:
        pytest.skip("needs systemd-socket-activate, of the package systemd")
    a_machine.configure(gateway=True)
    a_machine.model(SIMULATED)
    a_machine.runtime.mkdir(exist_ok=True)
    port = free_port()
    front, back = a_machine.runtime / "front.sock", a_machine.runtime / "back.sock"
    command = [
        activate, "-l", f"127.0.0.1:{port}", "-l", str(front), "-l", str(back), "--fdname=http:front:back",
        sys.executable, "-m", "llmosd", "--root", str(a_machine.root),
    ]  # fmt: skip
    with (a_machine.root / "daemon.log").open("ab") as log:
        a_machine.daemon = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd="/")
    wait_for("socket to connect to", lambda: f"127.0.0.1:{port}" in a_machine.log())
    # The first connection starts the daemon, and is served by it.
    body = '{"model": "sim", "prompt": "one two", "max_tokens": 3}'
    url = f"http://127.0.0.1:{port}/v1/completions"
    curl = ["curl", "-sS", "--fail-with-body", "--max-time", "30", url, "-d", body]
    answer = subprocess.run(curl, capture_output=True, text=True, check=True).stdout
    assert '"completion_tokens":3' in answer
    assert a_machine.client.run("sim", "one two", max_tokens=2).text
    assert a_machine.stop() == 0
    # They are systemd's: a daemon that took their paths away would leave the next one deaf.
    assert front.is_socket() and back.is_socket()

"""circus and supervisord for the benchmark of supervision, from PyPI.

They are installed into a virtual environment of their own below the checkout (`.bench`), never into the project's, and
are asked over their own protocols on a connection that is kept, as circusctl and supervisorctl ask them.
"""

from __future__ import annotations

import http.client
import json
import shlex
import signal
import socket
import subprocess
import sys
import uuid
import xmlrpc.client
from pathlib import Path
from typing import Any, Final

import zmq

from bench import measure
from bench.machine import DEADLINE_S, NotMeasured
from bench.supervisors import STOP_S, Program

ENVIRONMENT: Final = Path(__file__).resolve().parents[1] / ".bench"
VERSIONS: Final = {"circus": "0.19.0", "supervisor": "4.3.0"}


def install() -> None:
    """Make the peers' environment, unless it is there with these versions."""
    wanted = [f"{name}=={version}" for name, version in VERSIONS.items()]
    done = ENVIRONMENT / "installed"
    if done.exists() and done.read_text().split() == wanted:
        return
    measure.progress(f"installs {' and '.join(wanted)} into {ENVIRONMENT}")
    for command in (
        [sys.executable, "-m", "venv", str(ENVIRONMENT)],
        [str(ENVIRONMENT / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check", *wanted],
    ):
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        if made.returncode != 0:
            raise NotMeasured(f"the peers cannot be installed: {' '.join(command)}:\n{made.stderr[-2000:]}")
    done.write_text("\n".join(wanted))


class _Peer:
    """A peer's process, from the environment of peers."""

    def __init__(self, root: Path, argv: list[str]) -> None:
        self._root = root
        self._argv = [str(ENVIRONMENT / "bin" / argv[0]), *argv[1:]]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def launch(self) -> None:
        with (self._root / "peer.log").open("ab") as log:
            self._process = subprocess.Popen(
                self._argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self._root, start_new_session=True
            )

    def crash(self) -> None:
        self._disconnect()
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        self._disconnect()
        process = self._process
        if process is None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _alive(self) -> None:
        assert self._process is not None
        if self._process.poll() is not None:
            log = (self._root / "peer.log").read_text(errors="replace")
            raise NotMeasured(f"{self._argv[0]} ended:\n{log[-2000:]}")

    def _disconnect(self) -> None:
        """Drop the connection."""


class Circus(_Peer):
    """A watcher for each program; asked over its ZeroMQ endpoint, as circusctl does it."""

    TUNED = "check_delay = 0.1, stop_children = true"

    def __init__(self, root: Path, programs: list[Program], *, tuned: bool = False) -> None:
        self._endpoint = f"ipc://{root}/circus.sock"
        lines = [
            "[circus]",
            f"endpoint = {self._endpoint}",
            f"pubsub_endpoint = ipc://{root}/circus-events.sock",
            *(["check_delay = 0.1"] if tuned else []),
        ]
        for program in programs:
            lines += [
                f"[watcher:{program.name}]",
                f"cmd = {shlex.join(program.command)}",
                f"numprocesses = {program.count}",
                f"graceful_timeout = {STOP_S}",
                *(["stop_children = true"] if tuned else []),
            ]
        (root / "circus.ini").write_text("\n".join(lines) + "\n")
        super().__init__(root, ["circusd", str(root / "circus.ini")])
        self._socket: zmq.Socket[bytes] | None = None

    def answers(self) -> bool:
        self._alive()
        return self._call("numwatchers", timeout_s=0.2) is not None

    def running(self, program: str) -> set[int]:
        return set(self._ask("list", name=program)["pids"])

    def start(self, program: str) -> None:
        self._ask("start", name=program)

    def stop(self, program: str) -> None:
        self._ask("stop", name=program, waiting=True)

    def _ask(self, command: str, **properties: object) -> dict[str, Any]:
        answer = self._call(command, timeout_s=DEADLINE_S, **properties)
        if answer is None or answer.get("status") == "error":
            raise NotMeasured(f"circus was asked for {command} and answered {answer}")
        return answer

    def _call(self, command: str, *, timeout_s: float, **properties: object) -> dict[str, Any] | None:
        """The answer, or None if there is none in time: then the connection is given up."""
        if self._socket is None:
            self._socket = zmq.Context.instance().socket(zmq.DEALER)
            self._socket.setsockopt(zmq.LINGER, 0)
            self._socket.connect(self._endpoint)
        call = uuid.uuid4().hex
        self._socket.send(json.dumps({"id": call, "command": command, "properties": properties}).encode())
        while self._socket.poll(int(timeout_s * 1000)):
            answer: dict[str, Any] = json.loads(self._socket.recv())
            if answer.get("id") == call:
                return answer
        self._disconnect()
        return None

    def _disconnect(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


class Supervisord(_Peer):
    """A [program:x] for each; asked by XML-RPC over its unix socket, as supervisorctl does it."""

    TUNED = "startsecs = 0, stopasgroup = true, killasgroup = true"

    def __init__(self, root: Path, programs: list[Program], *, tuned: bool = False) -> None:
        self._path = root / "supervisor.sock"
        self._several = {program.name for program in programs if program.count > 1}
        lines = [
            "[supervisord]",
            "nodaemon = true",
            f"logfile = {root}/supervisord.log",
            f"pidfile = {root}/supervisord.pid",
            f"childlogdir = {root}",
            "[unix_http_server]",
            f"file = {self._path}",
            "[rpcinterface:supervisor]",
            "supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface",
        ]
        for program in programs:
            lines += [
                f"[program:{program.name}]",
                f"command = {shlex.join(program.command)}",
                "autorestart = true",
                f"stopwaitsecs = {STOP_S}",
                *(["startsecs = 0", "stopasgroup = true", "killasgroup = true"] if tuned else []),
            ]
            if program.count > 1:
                lines += [f"numprocs = {program.count}", "process_name = %(program_name)s-%(process_num)d"]
        (root / "supervisord.conf").write_text("\n".join(lines) + "\n")
        super().__init__(root, ["supervisord", "-c", str(root / "supervisord.conf")])
        self._rpc: Any = None

    def answers(self) -> bool:
        self._alive()
        try:
            return bool(self._ask().getState()["statename"] == "RUNNING")
        except (OSError, http.client.HTTPException):
            self._disconnect()
            return False

    def running(self, program: str) -> set[int]:
        rows: list[dict[str, Any]] = self._ask().getAllProcessInfo()
        return {row["pid"] for row in rows if row["group"] == program and row["statename"] == "RUNNING"}

    def start(self, program: str) -> None:
        if program in self._several:
            self._ask().startProcessGroup(program, False)
        else:
            self._ask().startProcess(program, False)

    def stop(self, program: str) -> None:
        if program in self._several:
            self._ask().stopProcessGroup(program, True)
        else:
            self._ask().stopProcess(program, True)

    def _ask(self) -> Any:
        if self._rpc is None:
            self._rpc = xmlrpc.client.ServerProxy("http://supervisor", _UnixTransport(self._path))
        return self._rpc.supervisor

    def _disconnect(self) -> None:
        if self._rpc is not None:
            self._rpc("close")()
            self._rpc = None


class _UnixTransport(xmlrpc.client.Transport):
    """XML-RPC over a unix socket, on one connection that is kept."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def make_connection(self, host: Any) -> http.client.HTTPConnection:
        connection = self._connection[1]
        if connection is None:
            connection = _UnixConnection(self._path)
            self._connection = host, connection
        return connection


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(self._path))

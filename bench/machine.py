"""A real daemon for a benchmark: `python -m llmosd --root DIR`, in a directory of its own, gone afterwards."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import llmos
from llmos.errors import LlmosError

T = TypeVar("T")
#: Seconds in which anything that is waited for must happen.
DEADLINE_S = 60.0


class NotMeasured(Exception):  # noqa: N818  # it is a statement of fact
    """What was to be measured did not come about. The message says why."""


def wait_for(what: str, look: Callable[[], T], deadline_s: float = DEADLINE_S) -> T:
    """Look until it is true, and return it. Raises NotMeasured with `what`."""
    end = time.monotonic() + deadline_s
    while not (found := look()):
        if time.monotonic() > end:
            raise NotMeasured(f"no {what} after {deadline_s:g} s")
        time.sleep(0.02)
    return found


class Machine:
    """A daemon, its directory and its model files."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.runtime = root / "run"
        self.front = f"ipc://{self.runtime}/front.sock"
        self.back = f"ipc://{self.runtime}/back.sock"
        self.url = ""
        self._models = root / "etc" / "models.d"
        self._models.mkdir(parents=True)
        self._daemon: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The daemon's."""
        assert self._daemon is not None
        return self._daemon.pid

    def model(self, name: str, text: str) -> None:
        (self._models / f"{name}.toml").write_text(f'model = "{name}"\n{text}')

    def start(self, *, gateway: bool = False) -> None:
        """Start the daemon, and wait until it answers. With `gateway`, HTTP is at `url`."""
        self.launch(gateway=gateway)
        wait_for("daemon that answers", self.answers)

    def launch(self, *, gateway: bool = False) -> None:
        settings = "[gateway]\nenabled = false\n"
        if gateway:
            listen = f"127.0.0.1:{free_port()}"
            settings = f'[gateway]\nlisten = "{listen}"\n'
            self.url = f"http://{listen}"
        (self.root / "etc" / "llmosd.toml").write_text(settings)
        with (self.root / "daemon.log").open("ab") as log:
            command = [sys.executable, "-m", "llmosd", "--root", str(self.root)]
            self._daemon = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd="/")

    def kill(self) -> None:
        """End the daemon with SIGKILL; its workers live on."""
        assert self._daemon is not None
        self._daemon.kill()
        self._daemon.wait()

    def client(self) -> llmos.Client:
        return llmos.Client(str(self.runtime))

    def wait_ready(self, model: str, count: int = 1) -> None:
        """Until so many workers of a model are ready."""
        with self.client() as client:
            wait_for(
                f"{count} ready workers of {model}",
                lambda: sum(w.model == model and w.state == "ready" for w in client.ps()) >= count,
            )

    def worker_pid(self, name: str) -> int:
        with self.client() as client:
            return client.worker(name).pid

    def close(self) -> None:
        """Stop the daemon, which ends its workers."""
        daemon = self._daemon
        if daemon is None:
            return
        daemon.send_signal(signal.SIGTERM)
        try:
            daemon.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()

    def answers(self) -> bool:
        assert self._daemon is not None
        if self._daemon.poll() is not None:
            log = (self.root / "daemon.log").read_text(errors="replace")
            raise NotMeasured(f"the daemon ended:\n{log[-4000:]}")
        try:
            with llmos.Client(str(self.runtime), patience=1) as client:
                return client.status().state == "running"
        except LlmosError:
            return False


@contextlib.contextmanager
def machine() -> Iterator[Machine]:
    """A machine whose daemon was not started yet."""
    # Below /tmp whatever TMPDIR says: sockets' paths must be short.
    root = Path(tempfile.mkdtemp(prefix="llmosd-b-", dir="/tmp"))
    made = Machine(root)
    try:
        yield made
    except BaseException:
        if (root / "daemon.log").exists():
            sys.stderr.write((root / "daemon.log").read_text(errors="replace")[-4000:])
        raise
    finally:
        made.close()
        shutil.rmtree(root, ignore_errors=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

"""A real daemon for a test: in a directory of its own, with real workers, and nothing left of it afterwards."""

from __future__ import annotations

import contextlib
import hashlib
import os
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

import psutil

import llmos
from llmos.errors import LlmosError
from llmos.types import Worker

T = TypeVar("T")

#: Seconds in which anything that a test waits for must happen; this machine may be busy.
DEADLINE_S = 30.0

SIMULATED = """
model = "sim"
[engine]
driver = "simulated"
load_time = "50ms"
decode_rate = 200
"""


def wait_for(what: str, look: Callable[[], T], deadline_s: float = DEADLINE_S) -> T:
    """Look until it is true, and return it; fail with `what` after the deadline."""
    end = time.monotonic() + deadline_s
    while True:
        if found := look():
            return found
        assert time.monotonic() < end, f"after {deadline_s:g} s there is still no {what}"
        time.sleep(0.02)


class Machine:
    """One daemon and its directory. The same directory outlives several daemons, as on a real machine."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.runtime = root / "run"
        self.models = root / "etc" / "models.d"
        self.models.mkdir(parents=True)
        self.http_port = 0
        #: Of the daemon: added to this process's environment, and put before its command.
        self.env: dict[str, str] = {}
        self.prefix: tuple[str, ...] = ()
        self._failpoint = ""
        self.daemon: subprocess.Popen[bytes] | None = None
        self._clients = contextlib.ExitStack()
        self._watcher: llmos.Client | None = None
        self.configure()

    def configure(self, text: str = "", *, gateway: bool = False) -> None:
        """Write llmosd.toml. With `gateway`, HTTP is served on `http_port`."""
        if gateway:
            self.http_port = self.http_port or free_port()
            text = f'[gateway]\nlisten = "127.0.0.1:{self.http_port}"\n{text}'
        else:
            text = f"[gateway]\nenabled = false\n{text}"
        (self.root / "etc" / "llmosd.toml").write_text(text)

    def model(self, text: str, name: str | None = None) -> None:
        """Write a model file, for the next start or reload."""
        name = name or text.split('model = "', 1)[1].split('"', 1)[0]
        (self.models / f"{name}.toml").write_text(text)

    def start(self, *, expect_failure: bool = False) -> None:
        """Start the daemon, and wait until it answers."""
        self._watch_no_more()
        log = (self.root / "daemon.log").open("ab")
        command = [*self.prefix, sys.executable, "-m", "llmosd", "--root", str(self.root)]
        # From a directory of no meaning: nothing may depend on where it was started.
        self.daemon = subprocess.Popen(
            command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd="/", env={**os.environ, **self.env}
        )
        log.close()
        if expect_failure:
            return

        def answers() -> bool:
            assert self.daemon is not None and self.daemon.poll() is None, f"the daemon ended:\n{self.log()}"
            try:
                with llmos.Client(str(self.runtime), patience=1) as client:
                    return client.status().state == "running"
            except LlmosError:
                return False

        wait_for("daemon that answers", answers)

    @property
    def client(self) -> llmos.Client:
        """A client of its own, closed with the machine."""
        return self._clients.enter_context(llmos.Client(str(self.runtime)))

    @property
    def watcher(self) -> llmos.Client:
        """A client to look at this daemon with, again and again: connecting costs more than a look."""
        self._watcher = self._watcher or llmos.Client(str(self.runtime))
        return self._watcher

    def _watch_no_more(self) -> None:
        if self._watcher is not None:
            self._watcher.close()
            self._watcher = None

    @property
    def url(self) -> str:
        """Where the gateway is."""
        return f"http://127.0.0.1:{self.http_port}"

    # -- failpoints (see llmosd.failpoint) ------------------------------------------------------------------

    def prepare_failpoint(self, script: str) -> None:
        """A failpoint for `arm`. Before the daemon is started."""
        self._failpoint = script
        self.env["LLMOSD_FAILPOINTS"] = f"@{self.root}/failpoint"

    def arm(self) -> None:
        """From now on the failpoint is in force, for the daemon that runs and for those to come."""
        (self.root / "failpoint").write_text(self._failpoint)

    def disarm(self) -> None:
        (self.root / "failpoint").unlink()

    def log(self) -> str:
        return (self.root / "daemon.log").read_text(errors="replace")

    def kill(self) -> None:
        """SIGKILL the daemon; its workers live."""
        assert self.daemon is not None
        self.daemon.kill()
        self.daemon.wait()
        self.daemon = None

    def stop(self) -> int:
        """SIGTERM the daemon, and wait for its end; returns its exit status."""
        assert self.daemon is not None
        self.daemon.send_signal(signal.SIGTERM)
        status = self.daemon.wait(DEADLINE_S * 2)
        self.daemon = None
        return status

    def llmos(self, *args: str, stdin: str = "", timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Run the `llmos` command."""
        command = [str(Path(sys.executable).with_name("llmos")), *args]
        env = {**os.environ, "LLMOS_HOST": str(self.runtime), "COLUMNS": "200"}
        return subprocess.run(
            command, input=stdin, capture_output=True, text=True, timeout=timeout, env=env, cwd="/", check=False
        )

    def worker(self, name: str) -> Worker:
        return self.watcher.worker(name)

    def wait_worker(self, name: str, *states: str, not_pid: int = 0) -> Worker:
        """Wait until a worker is in one of the states, with another process than `not_pid`."""

        def look() -> Worker | None:
            try:
                worker = self.worker(name)
            except LlmosError:
                return None
            return worker if worker.state in states and (not not_pid or worker.pid != not_pid) else None

        return wait_for(f"worker {name} in {' or '.join(states)}", look)

    @property
    def group(self) -> str:
        """What this daemon calls its cgroups' directory, and begins its marks with."""
        return f"llmosd-{hashlib.sha256(str(self.runtime).encode()).hexdigest()[:12]}"

    def cgroups(self) -> list[Path]:
        """The directories of this daemon's cgroups; none where none can be made."""
        mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        roots = [Path(fields[4]) for fields in mounts if fields[fields.index("-") + 1] == "cgroup2"]
        # Not rglob, which fails when one of others goes meanwhile.
        return [Path(at, self.group) for root in roots for at, names, _ in os.walk(root) if self.group in names]

    def check_cgroups(self) -> None:
        """Wait until each live worker has a cgroup with all of its processes and no other, and nothing else has one."""

        def agree() -> bool:
            workers = {worker.name: worker.pid for worker in self.watcher.ps() if worker.pid}
            groups = [path for base in self.cgroups() for path in base.iterdir() if "@" in path.name]
            if sorted(path.name.rpartition("-")[0] for path in groups) != sorted(workers):
                return False
            return all(_held(path) == _tree(workers[path.name.rpartition("-")[0]]) for path in groups)

        assert not self.cgroups() or wait_for("cgroups that hold the workers and nobody else", agree)

    def processes(self) -> list[int]:
        """Every process on this machine that belongs to this daemon's workers: by mark, and by cgroup."""
        group = self.group
        mark = f"LLMOSD_GROUP={group}/".encode()
        found = []
        for directory in Path("/proc").glob("[0-9]*"):
            try:
                status = (directory / "stat").read_bytes().rpartition(b")")[2].split()[0]
                marked = mark in (directory / "environ").read_bytes()
                grouped = group in (directory / "cgroup").read_text()
            except OSError:
                continue
            if (marked or grouped) and status not in (b"Z", b"X"):
                found.append(int(directory.name))
        return found

    def check_processes(self) -> None:
        """Wait until there is no process besides those that `ps` shows, and nobody unreaped."""

        def others() -> set[int]:
            shown = {pid for worker in self.watcher.ps() for pid in (worker.pid, worker.engine_pid)}
            return set(self.processes()) - shown

        wait_for("end of all other processes", lambda: not others() and not self.zombies())

    def zombies(self) -> list[int]:
        """Children of the daemon that ended and were not reaped."""
        assert self.daemon is not None
        found = []
        for path in Path(f"/proc/{self.daemon.pid}/task").glob("*/children"):
            for pid in map(int, path.read_text().split()):
                with contextlib.suppress(OSError):
                    if Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] == b"Z":
                        found.append(pid)
        return found

    def sockets(self) -> list[Path]:
        return [path for path in self.root.rglob("*") if path.is_socket()]

    def close(self) -> None:
        """End everything, whatever state it is in."""
        self._watch_no_more()
        self._clients.close()
        if self.daemon is not None:
            self.daemon.kill()
            self.daemon.wait()
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for base in self.cgroups():
            for path in sorted(base.glob("**/"), reverse=True):
                with contextlib.suppress(OSError):
                    path.rmdir()  # one whose last process has not quite gone stays: the test has failed already


def _held(cgroup: Path) -> set[int]:
    """The processes in a cgroup, and in those below it."""
    try:
        return {int(pid) for file in cgroup.rglob("cgroup.procs") for pid in file.read_text().split()}
    except OSError:
        return set()  # it was just removed


def _tree(pid: int) -> set[int]:
    """A process and its descendants, without those that have ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        leader = psutil.Process(pid)
        tree = (leader, *leader.children(recursive=True))
        return {process.pid for process in tree if process.status() != psutil.STATUS_ZOMBIE}
    return {0}  # some of it just ended


@contextlib.contextmanager
def machine() -> Iterator[Machine]:
    """A machine whose daemon was not started yet; checked, at the end, to have left nothing."""
    # Not pytest's tmp_path: sockets' paths must be short.
    root = Path(tempfile.mkdtemp(prefix="llmosd-t-", dir="/tmp"))
    made = Machine(root)
    try:
        yield made
        if made.daemon is not None:
            assert made.client.status().counters["faults"] == 0, made.log()
            made._clients.close()
            assert made.stop() == 0, f"the daemon failed:\n{made.log()}"
            assert wait_for("end of all processes", lambda: not made.processes())
            assert made.sockets() == []
            assert made.cgroups() == []
            assert "Traceback" not in made.log(), made.log()
    finally:
        # Shown by pytest where the test failed.
        if (root / "daemon.log").exists():
            print(made.log()[-20_000:])
        made.close()
        shutil.rmtree(root, ignore_errors=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

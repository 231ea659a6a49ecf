"""A supervisor at work in a directory of its own, with children that tell when they begin; nothing left afterwards."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Final

import msgspec
import psutil

from bench import measure
from bench.machine import DEADLINE_S, NotMeasured, wait_for
from bench.supervisors import Program, Supervisor

#: The program that each of them runs, by this name.
NAME: Final = "worker"
_LINES: Final = 1 << 16


class Kind(msgspec.Struct, frozen=True):
    """One of the three, as it comes or tuned."""

    name: str
    make: Callable[..., Supervisor]
    #: What its tuned variant changes; empty: it is as it comes.
    changed: str = ""
    #: Seconds between two of its regular looks, where a child's end waits for one: it is killed at a random moment of
    #: them, not right after what the benchmark did before.
    period_s: float = 0.0


class Beginning(msgspec.Struct, frozen=True):
    """What a child wrote with its first breath, and when that arrived."""

    pid: int
    at: float


class Beginnings:
    """Reads the FIFO in a thread, so that a moment is that of the arrival, whatever else is being waited for."""

    def __init__(self, fifo: Path) -> None:
        os.mkfifo(fifo)
        # For reading and writing, so that it never has an end.
        self._fd = os.open(fifo, os.O_RDWR | os.O_NONBLOCK)
        self._wake, self._stop = os.pipe()
        self._queue: SimpleQueue[Beginning] = SimpleQueue()
        #: With the time of their birth, so that a number that is used again is not taken for one of them.
        self.processes: dict[int, psutil.Process] = {}
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        rest = b""
        while True:
            ready = select.select([self._fd, self._wake], [], [])[0]
            at = time.perf_counter()
            if self._wake in ready:
                return
            *lines, rest = (rest + os.read(self._fd, _LINES)).split(b"\n")
            for line in lines:
                self._queue.put(Beginning(int(line), at))

    def next(self, deadline_s: float = DEADLINE_S) -> Beginning:
        try:
            one = self._queue.get(timeout=deadline_s)
        except Empty:
            raise NotMeasured(f"no child began within {deadline_s:g} s") from None
        self._know(one.pid)
        return one

    def forget(self) -> None:
        """Those that were not asked for."""
        with contextlib.suppress(Empty):
            while True:
                self._know(self._queue.get_nowait().pid)

    def alive(self) -> list[psutil.Process]:
        self.forget()
        return [one for one in self.processes.values() if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]

    def _know(self, pid: int) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            self.processes[pid] = psutil.Process(pid)

    def close(self) -> None:
        os.write(self._stop, b"x")
        self._thread.join()
        for fd in (self._fd, self._wake, self._stop):
            os.close(fd)


class Arm:
    """One supervisor and its children."""

    def __init__(self, kind: Kind, root: Path, count: int, program: Path | None) -> None:
        self.kind = kind
        self.fifo = root / "began"
        self.beginnings = Beginnings(self.fifo)
        self.command: tuple[str, ...] = (sys.executable, "-I", "-S", str(program), str(self.fifo))
        if program is None:
            script = root / "child.sh"
            script.write_text(f"echo $$ > {self.fifo}\nexec /bin/sleep 1000000\n")
            self.command = ("/bin/sh", str(script))
        self.supervisor = kind.make(root, [Program(NAME, self.command, count)], tuned=bool(kind.changed))

    def launch(self) -> None:
        self.supervisor.launch()
        wait_for(f"{self.kind.name} that answers", self.supervisor.answers)

    def running(self) -> set[int]:
        return self.supervisor.running(NAME)

    def wait_running(self, count: int = 1, *, with_pid: int = 0) -> None:
        def look() -> bool:
            pids = self.running()
            return len(pids) >= count and (not with_pid or with_pid in pids)

        wait_for(f"{count} children that {self.kind.name} calls running", look)

    def family(self) -> list[psutil.Process]:
        """Everything that carries the FIFO in its arguments, and lives."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                # Not the supervisor, which may have it in its own.
                if str(self.fifo) in process.cmdline()[1:] and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def own(self) -> list[psutil.Process]:
        """The supervisor's own processes: those below it that are neither its children nor theirs."""
        children = self.beginnings.processes
        found, look_at = [], [psutil.Process(self.supervisor.pid)]
        while look_at:
            process = look_at.pop()
            found.append(process)
            look_at += [child for child in process.children() if child.pid not in children]
        return found

    def close(self) -> None:
        self.supervisor.close()
        # Stopped first: they start each other again.
        for act in (psutil.Process.suspend, psutil.Process.kill):
            for _ in range(3):
                for process in [*self.beginnings.alive(), *self.family()]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        act(process)
        self.beginnings.close()


@contextlib.contextmanager
def supervised(kind: Kind, count: int = 1, program: Path | None = None) -> Iterator[Arm]:
    """A supervisor that was not launched yet. Its program: a shell that becomes `sleep`, or a file of Python's."""
    measure.progress(kind.name)
    # Below /tmp whatever TMPDIR says: sockets' paths must be short.
    root = Path(tempfile.mkdtemp(prefix="llmosd-b-", dir="/tmp"))
    arm = Arm(kind, root, count, program)
    try:
        yield arm
    finally:
        arm.close()
        shutil.rmtree(root, ignore_errors=True)

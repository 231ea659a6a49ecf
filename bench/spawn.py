"""How soon a worker is back, what starting one costs, and what a hundred that do nothing cost the daemon.

- *Launcher*: from `posix_spawn` of the child that waits at the gate to the exec of its program, against a bare
  `posix_spawn` of the same program. What is between is an interpreter without its library (`python -I -S`), which sets
  the worker's properties where no library's thread can be in the way.
- *Respawn*: a real daemon's `command` worker is killed, and the first line of its successor read from a FIFO. In
  between are: exit seen, group found empty, record removed, kernel, launcher, and the start of `/bin/sh`. The back-off
  is declared as nothing, for it is not what is measured.
- *Idle*: the daemon's memory and CPU time with 100 `command` workers asleep.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Final

import psutil
import uvloop

from bench import measure
from bench.machine import Machine, NotMeasured, machine, wait_for
from llmosd.launch.gate import Gate, Order

PROGRAM: Final = "/bin/true"
IDLE_WORKERS: Final = 100
_STARTED_WITHIN_S: Final = 10.0


def main(quick: bool) -> None:
    _launcher(10 if quick else 40)
    _respawn(5 if quick else 20)
    _idle(4.0 if quick else 10.0)


# -- the launcher -----------------------------------------------------------------------------------------------


def _launcher(rounds: int) -> None:
    interpreter = [sys.executable, "-I", "-S", "-c", ""]
    arms: dict[str, Callable[[], float]] = {
        "through the gate, until exec": _through_the_gate,
        "an empty interpreter (`python -I -S -c ''`), until its end": partial(_until_it_ended, interpreter),
        f"{PROGRAM} by posix_spawn, until its end": partial(_until_it_ended, [PROGRAM]),
    }
    runs = measure.take_turns(arms, rounds)
    measure.table("Spawn: the launcher, ms", ("", "ms"), [[arm, measure.spread(runs[arm]).show(1)] for arm in arms])


def _through_the_gate() -> float:
    gate, took = uvloop.run(_launch())
    os.waitpid(gate.pid, 0)
    os.close(gate.pidfd)
    return took * 1000


async def _launch() -> tuple[Gate, float]:
    null = os.open(os.devnull, os.O_RDWR)
    start = time.perf_counter()
    gate = Gate.spawn(stdin=null, stdout=null, stderr=null)
    await gate.go(Order(argv=(PROGRAM,), env={}, umask=0o027, subreaper=True))
    took = time.perf_counter() - start
    os.close(null)
    return gate, took


def _until_it_ended(argv: list[str]) -> float:
    start = time.perf_counter()
    pid = os.posix_spawn(argv[0], argv, {})
    os.waitpid(pid, 0)
    return (time.perf_counter() - start) * 1000


# -- exit to respawn --------------------------------------------------------------------------------------------


def _respawn(rounds: int) -> None:
    with machine() as made:
        fifo = made.root / "started"
        os.mkfifo(fifo)
        made.model(
            "phoenix",
            f"""kind = "service"
[engine]
driver = "command"
command = ["/bin/sh", "-c", "echo $$ > {fifo}; exec sleep 1d"]
[scale]
min = 1
[restart]
policy = "always"
delay = "0s"
burst = 0
""",
        )
        # For reading and writing, so that it never has an end.
        reader = os.open(fifo, os.O_RDWR | os.O_NONBLOCK)
        made.start()
        pid = _started(reader)
        took = []
        for number in range(rounds):
            measure.progress(f"respawn {number + 1} of {rounds}")
            wait_for("ready worker", partial(_is_ready, made, pid))
            killed_at = time.perf_counter()
            os.kill(pid, signal.SIGKILL)
            pid = _started(reader)
            took.append((time.perf_counter() - killed_at) * 1000)
        os.close(reader)
    measure.progress("")
    rows = [["SIGKILL until the successor's first line", measure.spread(took).show(1), "≤ 20"]]
    measure.table("Spawn: from exit to respawn, ms", ("", "ms", "goal"), rows)


def _started(reader: int) -> int:
    """The process id that the next start writes."""
    if not select.select([reader], [], [], _STARTED_WITHIN_S)[0]:
        raise NotMeasured(f"no worker started within {_STARTED_WITHIN_S:g} s")
    return int(os.read(reader, 64).split()[-1])


def _is_ready(made: Machine, pid: int) -> bool:
    with made.client() as client:
        return any(worker.pid == pid and worker.state == "ready" for worker in client.ps())


# -- idle workers -----------------------------------------------------------------------------------------------


def _idle(seconds: float) -> None:
    with machine() as made:
        made.start()
        alone = psutil.Process(made.pid).memory_info().rss
        made.model(
            "idle",
            f"""kind = "service"
[engine]
driver = "command"
command = ["/bin/sleep", "1d"]
[scale]
min = {IDLE_WORKERS}
max = {IDLE_WORKERS}
""",
        )
        start = time.perf_counter()
        os.kill(made.pid, signal.SIGHUP)
        measure.progress(f"starts {IDLE_WORKERS} workers")
        made.wait_ready("idle", IDLE_WORKERS)
        up = time.perf_counter() - start
        measure.progress(f"watches {IDLE_WORKERS} idle workers for {seconds:g} s")
        before = measure.cpu_of(made.pid)
        time.sleep(seconds)
        used = measure.cpu_between(before, measure.cpu_of(made.pid))
        rss = psutil.Process(made.pid).memory_info().rss
    measure.progress("")
    rows = [
        ["until all of them run, s", f"{up:.1f}", ""],
        ["daemon's CPU time, % of a core", f"{used.total / seconds * 100:.1f}", "< 1 with 1,000"],
        ["daemon's RSS, MB", f"{rss / 1e6:.0f} ({alone / 1e6:.0f} without any)", "< 100 with 1,000"],
    ]
    measure.table(f"Spawn: {IDLE_WORKERS} idle `command` workers", ("", "", "goal"), rows)

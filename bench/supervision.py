"""llmosd beside circus and supervisord: how fast they start, notice and stop, what they cost idle, what survives them.

All three run the same children, started, killed and stopped in turns. The clock is the benchmark's own: a child's first
act is to write into a FIFO, which a thread of the benchmark reads. See docs/benchmarks.md for what each figure counts.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import msgspec

import llmosd
from bench import measure, peer_supervisors
from bench.machine import wait_for
from bench.peer_supervisors import Circus, Supervisord
from bench.supervised import NAME, Arm, Kind, supervised
from bench.supervisors import STOP_S, Llmosd

LLMOSD: Final = Kind("llmosd", Llmosd)
CIRCUS: Final = Kind("circus", Circus, period_s=5.0)
SUPERVISORD: Final = Kind("supervisord", Supervisord, period_s=1.0)
AS_THEY_COME: Final = (LLMOSD, CIRCUS, SUPERVISORD)
TUNED: Final = (
    Kind("llmosd tuned", Llmosd, Llmosd.TUNED),
    Kind("circus tuned", Circus, Circus.TUNED, 0.1),
    Kind("supervisord tuned", Supervisord, Supervisord.TUNED, 1.0),
)
HEAD: Final = ("", "llmosd", "circus", "supervisord", "circus / llmosd", "supervisord / llmosd")
ESCAPES: Final = Path(__file__).with_name("escapes.py")
#: Processes of a tree of `escapes.py`.
TREE: Final = 4
#: Seconds after a stop until what is left counts as left.
_LEFT_AFTER_S: Final = 2.0
_RECOVERED: Final = 20


def main(quick: bool) -> None:
    peer_supervisors.install()
    # supervisord holds four descriptors a child, and a service manager would be asked for them (LimitNOFILE=).
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    peers = ", ".join(f"{name} {version}" for name, version in peer_supervisors.VERSIONS.items())
    tuned = "; ".join(f"{kind.name}: {kind.changed}" for kind in TUNED)
    print(f"\nSupervision: llmosd {llmosd.__version__}, {peers}. {tuned}.")
    _latencies(3 if quick else 15)
    _stop_of_a_tree(1 if quick else 3)
    _idle((5, 20) if quick else (10, 100, 1000), 5.0 if quick else 15.0)
    _recovery(1 if quick else 5)


# -- starts and restarts ----------------------------------------------------------------------------------------


def _latencies(rounds: int) -> None:
    moment = random.Random(0)
    with contextlib.ExitStack() as stack:
        arms = {kind.name: stack.enter_context(supervised(kind)) for kind in (*AS_THEY_COME, *TUNED)}
        for arm in arms.values():
            arm.launch()
            arm.wait_running()
        bare = measure.take_turns({"bare": partial(_bare_start, arms["llmosd"])}, rounds)["bare"]
        started = measure.take_turns(
            {name: partial(_start, arms[name]) for name in (k.name for k in AS_THEY_COME)}, rounds
        )
        restarted = measure.take_turns({name: partial(_restart, arm, moment) for name, arm in arms.items()}, rounds)
    rows = [
        _row("start request until the child's first act", started, AS_THEY_COME, 1),
        _row("SIGKILL until its successor's first act", restarted, AS_THEY_COME, 1),
        _row("the same, tuned", restarted, TUNED, 1),
    ]
    measure.table("Supervision: from a cause to a child that runs, ms", HEAD, rows)
    print(f"\nThe same child by a bare `posix_spawn`: {measure.spread(bare).show(1)} ms.")


def _bare_start(arm: Arm) -> float:
    arm.beginnings.forget()
    start = time.perf_counter()
    pid = os.posix_spawn(arm.command[0], arm.command, {})
    took = arm.beginnings.next().at - start
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return took * 1000


def _start(arm: Arm) -> float:
    arm.supervisor.stop(NAME)
    arm.beginnings.forget()
    start = time.perf_counter()
    arm.supervisor.start(NAME)
    began = arm.beginnings.next()
    arm.wait_running(with_pid=began.pid)
    return (began.at - start) * 1000


def _restart(arm: Arm, moment: random.Random) -> float:
    time.sleep(moment.uniform(0.2, 0.2 + arm.kind.period_s))
    (pid,) = arm.running()
    arm.beginnings.forget()
    start = time.perf_counter()
    os.kill(pid, signal.SIGKILL)
    began = arm.beginnings.next()
    arm.wait_running(with_pid=began.pid)
    return (began.at - start) * 1000


# -- a tree that does not want to stop --------------------------------------------------------------------------


class Stopped(msgspec.Struct, frozen=True):
    """How the stop of a tree went."""

    seconds: float
    left: int


def _stop_of_a_tree(rounds: int) -> None:
    kinds = (*AS_THEY_COME, *TUNED)
    runs = measure.take_turns({kind.name: partial(_stop_tree, kind) for kind in kinds}, rounds)
    rows = []
    for what, some in (("as they come", AS_THEY_COME), ("tuned", TUNED)):
        took = {kind.name: [run.seconds for run in runs[kind.name]] for kind in some}
        rows.append(_row(f"{what}: until it says that it is stopped, s", took, some, 2))
        left = [max(run.left for run in runs[kind.name]) for kind in some]
        rows.append([f"{what}: processes left, of {TREE}", *map(str, left), "", ""])
    measure.table(
        f"Supervision: stop of a tree that ignores SIGTERM ({STOP_S} s until SIGKILL) and forks away", HEAD, rows
    )


def _stop_tree(kind: Kind) -> Stopped:
    with supervised(kind, program=ESCAPES) as arm:
        arm.launch()
        for _ in range(TREE):
            arm.beginnings.next()
        arm.wait_running()
        start = time.perf_counter()
        arm.supervisor.stop(NAME)
        took = time.perf_counter() - start
        end = start + took + _LEFT_AFTER_S
        while (left := len(arm.family())) and time.perf_counter() < end:
            time.sleep(0.05)
        return Stopped(took, left)


# -- idle children ----------------------------------------------------------------------------------------------


class Idle(msgspec.Struct, frozen=True):
    """What a supervisor costs while its children sleep."""

    up_s: float
    cpu_percent: float
    pss_mb: float
    rss_mb: float


def _idle(counts: Sequence[int], seconds: float) -> None:
    rows = []
    eager = TUNED[1]
    for count in counts:
        runs = {kind.name: _idle_children(kind, count, seconds) for kind in (*AS_THEY_COME, eager)}
        figures: tuple[tuple[str, Callable[[Idle], float], int], ...] = (
            ("until all run, s", lambda run: run.up_s, 1),
            ("CPU, % of a core", lambda run: run.cpu_percent, 2),
            ("memory (PSS), MB", lambda run: run.pss_mb, 1),
            ("memory (RSS), MB", lambda run: run.rss_mb, 1),
        )
        for what, of, digits in figures:
            values = {name: [of(run)] for name, run in runs.items()}
            rows.append(_row(f"{count:,}: {what}", values, AS_THEY_COME, digits))
        row = _row(f"{count:,}: CPU with circus tuned", {n: [run.cpu_percent] for n, run in runs.items()},
                   (LLMOSD, eager, SUPERVISORD), 2)  # fmt: skip
        rows.append([row[0], "", row[2], "", row[4], ""])
    measure.table(f"Supervision: children that sleep, over {seconds:g} s", HEAD, rows)


def _idle_children(kind: Kind, count: int, seconds: float) -> Idle:
    with supervised(kind, count) as arm:
        measure.progress(f"{kind.name} starts {count} children")
        start = time.perf_counter()
        arm.supervisor.launch()
        for _ in range(count):
            last = arm.beginnings.next()
        wait_for(f"{kind.name} that answers", arm.supervisor.answers)
        arm.wait_running(count)
        # What it does once after a start is not what it does for days.
        time.sleep(seconds / 3)
        measure.progress(f"watches {kind.name} with {count} idle children for {seconds:g} s")
        own = arm.own()
        before = [measure.cpu_of(process.pid) for process in own]
        time.sleep(seconds)
        after = [measure.cpu_of(process.pid) for process in own]
        used = sum(measure.cpu_between(one, two).total for one, two in zip(before, after, strict=True))
        memory = [process.memory_full_info() for process in own]
        return Idle(
            up_s=last.at - start,
            cpu_percent=used / seconds * 100,
            pss_mb=sum(one.pss for one in memory) / 1e6,
            rss_mb=sum(one.rss for one in memory) / 1e6,
        )


# -- the supervisor is killed -----------------------------------------------------------------------------------


class Recovered(msgspec.Struct, frozen=True):
    """What a supervisor knew of its children after it was killed and started again."""

    seconds: float
    #: Children that lived on.
    alive: int
    #: Those that it supervises again.
    adopted: int
    #: Children that now run, where there should be as many as before.
    running: int


def _recovery(rounds: int) -> None:
    kinds = (*AS_THEY_COME, *TUNED)
    runs = measure.take_turns({kind.name: partial(_recover, kind) for kind in kinds}, rounds)
    rows = []
    for what, some in (("as they come", AS_THEY_COME), ("tuned", TUNED)):
        took = {kind.name: [run.seconds for run in runs[kind.name]] for kind in some}
        rows.append(_row(f"{what}: until it answers and shows {_RECOVERED} running, s", took, some, 2))
    figures: tuple[tuple[str, Callable[[Recovered], int]], ...] = (
        (f"children that lived on, of {_RECOVERED}", lambda run: run.alive),
        ("of these supervised again, with the same pid", lambda run: run.adopted),
        ("children that run in the end", lambda run: run.running),
    )
    for what, of in figures:
        counts = [sorted({of(run) for run in runs[kind.name]}) for kind in AS_THEY_COME]
        rows.append([what, *(" to ".join(map(str, {one[0]: 0, one[-1]: 0})) for one in counts), "", ""])
    measure.table("Supervision: the supervisor is killed (SIGKILL) and started again at once", HEAD, rows)


def _recover(kind: Kind) -> Recovered:
    with supervised(kind, _RECOVERED) as arm:
        arm.launch()
        for _ in range(_RECOVERED):
            arm.beginnings.next()
        arm.wait_running(_RECOVERED)
        before = arm.running()
        start = time.perf_counter()
        arm.supervisor.crash()
        arm.supervisor.launch()
        wait_for(f"{kind.name} that answers", arm.supervisor.answers)
        arm.wait_running(_RECOVERED)
        took = time.perf_counter() - start
        alive = {process.pid for process in arm.beginnings.alive()}
        return Recovered(took, len(alive & before), len(arm.running() & before), len(alive))


# -- rows -------------------------------------------------------------------------------------------------------


def _row(what: str, runs: Mapping[str, Sequence[float]], kinds: Sequence[Kind], digits: int) -> list[str]:
    """The three side by side, and how many times as much as llmosd each peer takes: above 1, llmosd takes less."""
    ours, *peers = (runs[kind.name] for kind in kinds)
    return [
        what,
        *(_figure(measure.spread(one), digits) for one in (ours, *peers)),
        *(_figure(measure.ratio(one, ours), 2, "x") for one in peers),
    ]


def _figure(spread: measure.Spread, digits: int, unit: str = "") -> str:
    return spread.show(digits, unit) if spread.low != spread.high else f"{spread.median:,.{digits}f}{unit}"

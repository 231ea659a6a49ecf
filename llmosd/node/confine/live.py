"""Changing processes that run: every thread of every process of a tree, again and again until nothing new shows up.

Affinity, nice and ionice belong to threads in Linux, whatever the manuals of the calls say, and threads and processes
may appear while the change is under way. For the `process` maker. A process that vanishes is none of our business.
"""

from __future__ import annotations

import errno
import os
import resource
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final

import msgspec
import psutil

_PROC: Final = Path("/proc")
_PASSES: Final = 50
#: An engine's oom_score_adj is this much above its host's: the engine goes first, and its host can tell why.
ENGINE_ABOVE_HOST: Final = 500


class Step(msgspec.Struct, frozen=True):
    """One limit's change. `change` takes a process's or a thread's id, and raises OSError when it fails."""

    limit: str
    change: Callable[[int], None]
    on_threads: bool
    #: What to do about EPERM or EACCES.
    advice: str


def change_tree(pids: Sequence[int], steps: Sequence[Step]) -> list[str]:
    """Carry out `steps` on `pids` and their descendants until a whole pass meets nothing new. Answers what failed."""
    done: set[tuple[str, int]] = set()
    failed: dict[tuple[str, int], list[int]] = {}
    for _ in range(_PASSES if steps else 0):
        before = len(done)
        for pid in with_descendants(pids):
            threads = _threads(pid)
            for step in steps:
                for target in threads if step.on_threads else [pid]:
                    if (step.limit, target) not in done:
                        done.add((step.limit, target))
                        _attempt(step, target, failed)
        if len(done) == before:
            break
    else:
        if steps:
            failed[("", errno.EAGAIN)] = list(pids)
    return [_sentence(limit, number, targets, steps) for (limit, number), targets in failed.items()]


def with_descendants(pids: Iterable[int]) -> list[int]:
    """`pids` and all their descendants, those of `pids` first."""
    children: dict[int, list[int]] = {}
    for process in psutil.process_iter(["ppid"]):
        children.setdefault(process.info["ppid"], []).append(process.pid)
    found = list(dict.fromkeys(pids))
    known = set(found)
    for pid in found:  # grows while it is walked
        for child in children.get(pid, ()):
            if child not in known:
                known.add(child)
                found.append(child)
    return found


def set_affinity(cpus: Iterable[int]) -> Callable[[int], None]:
    wanted = frozenset(cpus)
    return lambda tid: os.sched_setaffinity(tid, wanted)


def set_nice(value: int) -> Callable[[int], None]:
    return lambda tid: os.setpriority(os.PRIO_PROCESS, tid, value)


def set_ionice(io_class: int, level: int) -> Callable[[int], None]:
    def change(tid: int) -> None:
        try:
            # psutil takes a thread's id here as ioprio_set(2) does.
            psutil.Process(tid).ionice(io_class, level)
        except psutil.NoSuchProcess:
            raise ProcessLookupError(errno.ESRCH, "no such thread") from None
        except psutil.AccessDenied:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM)) from None

    return change


def set_session_nice(value: int) -> Callable[[int], None]:
    """For a kernel with autogroups, sched(7): there `nice` only counts between the threads of one session, and a
    session has a nice value of its own against the others. A worker's sessions are its own, never the daemon's."""
    ours = os.getsid(os.getpid())

    def change(pid: int) -> None:
        if os.getsid(pid) == ours:
            return
        path = _PROC / str(pid) / "autogroup"
        for attempt in range(20):
            try:
                if path.read_text().endswith(f"nice {value}\n"):
                    return
                path.write_text(str(value))
                return
            except BlockingIOError:
                # An ordinary user may do it ten times a second, all together.
                if attempt == 19:
                    raise
                time.sleep(0.1)

    return change


def autogroups_count() -> bool:
    """Whether this kernel schedules by session, as the sessions' autogroups say."""
    try:
        return (_PROC / "sys/kernel/sched_autogroup_enabled").read_text().strip() == "1"
    except OSError:
        return False  # a kernel without them


def set_open_files(soft: int, hard: int) -> Callable[[int], None]:
    def change(pid: int) -> None:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))

    return change


def set_oom_score_adj(value: int, leader: int) -> Callable[[int], None]:
    """The leader gets `value`; an engine, known by standing above its host so far, stays above it."""
    try:
        leader_before = oom_score_adj(leader)
    except OSError:
        leader_before = 1000
    engine_value = min(1000, value + ENGINE_ABOVE_HOST)

    def change(pid: int) -> None:
        now = oom_score_adj(pid)
        if pid == leader or now not in (value, engine_value):  # else it was born with the new one
            wanted = engine_value if pid != leader and now > leader_before else value
            (_PROC / str(pid) / "oom_score_adj").write_text(str(wanted))

    return change


def oom_score_adj(pid: int) -> int:
    return int((_PROC / str(pid) / "oom_score_adj").read_text())


def _attempt(step: Step, target: int, failed: dict[tuple[str, int], list[int]]) -> None:
    try:
        step.change(target)
    except (ProcessLookupError, FileNotFoundError):
        pass  # it ended
    except OSError as error:
        failed.setdefault((step.limit, error.errno or 0), []).append(target)


def _threads(pid: int) -> list[int]:
    try:
        return [int(path.name) for path in (_PROC / str(pid) / "task").iterdir()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def _sentence(limit: str, number: int, targets: list[int], steps: Sequence[Step]) -> str:
    some = ", ".join(str(target) for target in targets[:3]) + (", …" if len(targets) > 3 else "")
    if not limit:
        return f"processes or threads kept appearing under {some} for {_PASSES} passes; the newest may lack the limits"
    advice = next(step.advice for step in steps if step.limit == limit)
    hint = f": {advice}" if number in (errno.EPERM, errno.EACCES) and advice else ""
    return f"{limit} could not be changed on {some} ({os.strerror(number)}){hint}"

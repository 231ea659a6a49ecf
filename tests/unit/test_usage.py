"""What processes use, read from real processes; CPU percent also from made-up samples."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmosd.node.usage import CpuMeter, ProcessId, Usage, sample

MIB = 1 << 20
Start = Callable[[str], "subprocess.Popen[str]"]


def said(process: subprocess.Popen[str]) -> str:
    """The next line the program prints: it blocks until there is one, and pytest's timeout bounds it."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_anonymous_memory_counts_and_mapped_file_pages_do_not(start: Start, tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    weights.write_bytes(b"w" * 64 * MIB)
    process = start(
        "import mmap, sys\n"
        f"file = open({str(weights)!r}, 'rb'); mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)\n"
        "assert sum(mapped[::4096]) > 0\n"
        f"own = b'x' * {32 * MIB}; print('ready', flush=True); sys.stdin.read()"
    )
    assert said(process) == "ready"
    usage = sample([process.pid])
    assert 32 * MIB <= usage.memory_bytes < 64 * MIB
    assert usage.resident_bytes >= 96 * MIB


def test_an_exact_look_counts_shared_memory_once(start: Start) -> None:
    process = start(
        "import mmap, os, sys\n"
        f"shared = mmap.mmap(-1, {48 * MIB}); shared.write(b'x' * {48 * MIB})\n"
        "child = os.fork()\n"
        "assert sum(shared[::4096]) > 0\n"
        "print(os.getpid(), flush=True); sys.stdin.read()"
    )
    pids = [int(said(process)), int(said(process))]
    assert sample(pids).memory_bytes >= 96 * MIB
    assert 48 * MIB <= sample(pids, exact=True).memory_bytes < 96 * MIB


def test_processes_and_threads_are_counted(start: Start) -> None:
    process = start(
        "import threading, sys\n"
        "for _ in range(3): threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
        "print('ready', flush=True); sys.stdin.read()"
    )
    other = start("import sys; print('ready', flush=True); sys.stdin.read()")
    assert said(process) == said(other) == "ready"
    usage = sample([process.pid, other.pid, process.pid])
    assert (usage.processes, usage.threads) == (2, 5)


def test_a_process_that_is_gone_counts_for_nothing(start: Start) -> None:
    process = start("pass")
    process.wait(timeout=30)
    usage = sample([process.pid])
    assert (usage.processes, usage.threads, usage.cpu_s, usage.memory_bytes) == (0, 0, 0, 0)


def test_a_zombie_holds_no_memory(start: Start) -> None:
    process = start("pass")
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    for exact in (False, True):
        usage = sample([process.pid], exact=exact)
        assert (usage.processes, usage.memory_bytes, usage.resident_bytes) == (1, 0, 0)


def test_the_cpu_time_of_a_busy_process_becomes_percent(start: Start) -> None:
    process = start(
        "import time\n"
        "for mark in (0.2, 0.6):\n"
        "    while time.process_time() < mark: pass\n"
        "    print(mark, flush=True)\n"
        "while True: pass"
    )
    meter = CpuMeter()
    said(process)
    assert meter.update(sample([process.pid]), 100.0) == 0
    said(process)
    # 0.4 s of CPU time, give or take what /proc rounds to and the process goes on using, in what we call a second
    assert meter.update(sample([process.pid]), 101.0) >= 35


def _usage(taken_ticks: int, **cpu: float) -> Usage:
    """A sample with processes such as p7_100=1.5: pid 7, started at tick 100, 1.5 CPU seconds."""
    processes = {}
    for name, cpu_s in cpu.items():
        pid, _, started = name.removeprefix("p").partition("_")
        processes[ProcessId(int(pid), int(started))] = cpu_s
    return Usage(sum(processes.values()), cpu_by_process=processes, taken_ticks=taken_ticks)


def test_a_process_that_ended_takes_nothing_from_the_others() -> None:
    meter = CpuMeter()
    meter.update(_usage(1000, p1_10=1.0, p2_20=500.0), 50.0)
    assert meter.update(_usage(1100, p1_10=2.0), 51.0) == pytest.approx(100)


def test_a_process_born_in_between_counts_and_an_old_one_seen_first_does_not() -> None:
    meter = CpuMeter()
    meter.update(_usage(1000, p1_10=1.0), 50.0)
    assert meter.update(_usage(1100, p1_10=1.0, p2_1050=0.5, p3_20=900.0), 51.0) == pytest.approx(50)


def test_a_process_id_that_is_used_again_is_another_process() -> None:
    meter = CpuMeter()
    meter.update(_usage(1000, p1_10=100.0), 50.0)
    assert meter.update(_usage(1100, p1_1010=0.25), 51.0) == pytest.approx(25)


def test_two_looks_at_the_same_moment_answer_the_same() -> None:
    meter = CpuMeter()
    meter.update(_usage(1000, p1_10=1.0), 50.0)
    first = meter.update(_usage(1100, p1_10=2.0), 51.0)
    assert meter.update(_usage(1100, p1_10=2.0), 51.0) == first


SAMPLES = st.lists(
    st.dictionaries(st.builds(ProcessId, st.integers(1, 5), st.integers(0, 50)), st.floats(0, 1e6)), max_size=10
)


@given(SAMPLES)
def test_the_percentage_is_never_negative_whatever_comes_and_goes(samples: list[dict[ProcessId, float]]) -> None:
    meter = CpuMeter()
    for moment, processes in enumerate(samples):
        usage = Usage(sum(processes.values()), cpu_by_process=processes, taken_ticks=moment * 5)
        assert meter.update(usage, float(moment)) >= 0

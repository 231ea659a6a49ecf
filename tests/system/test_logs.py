"""`llmos logs` and what a whole machine makes of workers that print: bounded, followed, and kept for the dead."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
from commands import done
from engine_models import command, openai
from machine import SIMULATED, Machine, wait_for

import llmos

ONCE = '[restart]\npolicy = "no"\n'
#: Lines with their numbers, in bursts, so that a reader of two busy cores may keep up.
COUNTING = """
import sys, time
for number in range(int(sys.argv[1]), int(sys.argv[2])):
    print(f"{number:050d}")
    if number % 500 == 499:
        sys.stdout.flush()
        time.sleep(float(sys.argv[3]))
"""


def counting(name: str, start: int, stop: int, pause_s: float = 0.0, rest: str = ONCE) -> str:
    argv = [sys.executable, "-c", COUNTING, str(start), str(stop), str(pause_s)]
    return command(argv, name=name, rest=rest)


def log_writer(machine: Machine) -> int:
    path = os.fsencode(machine.runtime / "logs.sock")
    for process in psutil.process_iter():
        try:
            if path in Path(f"/proc/{process.pid}/cmdline").read_bytes().split(b"\0"):
                return process.pid
        except OSError:
            continue
    return 0


def numbers(lines: list[str]) -> list[int]:
    """Of one that was stopped the last line may be cut."""
    return [int(line) for line in lines if len(line) == 50 and line.isdecimal()]


def wait_number(machine: Machine, above: int) -> int:
    """Wait for a number in the log of `steady`, and return it."""
    log = machine.root / "log" / "steady@1.log"

    def last() -> int:
        found = numbers(log.read_text().splitlines()) if log.exists() else []
        return found[-1] if found and found[-1] > above else 0

    return wait_for(f"number above {above}", last)


def check_numbers(lines: list[str], count: int) -> int:
    """Each number once and in order; a gap only where a line says so. Returns how many gaps."""
    expected, gaps, told = 0, 0, False
    for line in lines:
        if "bytes of this log were gone" in line:
            told = True
        elif line.isdecimal():
            number = int(line)
            assert number == expected or (told and number > expected), (number, expected)
            gaps += number != expected
            expected, told = number + 1, False
    assert expected == count
    return gaps


def test_a_command_never_takes_more_of_the_disk_than_its_cap(a_machine: Machine) -> None:
    cap = 1 << 20
    a_machine.configure(f'[logs]\nmax_size = "{cap}"\n')
    a_machine.start()
    client = a_machine.client
    client.apply(command(["sh", "-c", f"yes {'x' * 99} | head -c 500000000"], name="loud", rest=ONCE))
    client.start("loud")
    most = 0

    def ended() -> bool:
        nonlocal most
        sizes = []
        for path in (a_machine.root / "log").glob("loud@1.log*"):
            try:
                sizes.append(path.stat().st_size)
            except FileNotFoundError:
                continue  # just rotated
        most = max(most, sum(sizes))
        return client.worker("loud@1").state == "stopped"

    wait_for("end of the printing", ended, 90)
    assert cap // 2 <= most <= cap


def test_a_flood_is_followed_over_rotations_and_a_restart_of_the_daemon_without_a_line_lost_or_twice(
    a_machine: Machine,
) -> None:
    count = 200_000  # 10 MB, five files of the log
    a_machine.configure('[logs]\nmax_size = "4M"\n')
    a_machine.start()
    a_machine.client.apply(counting("counting", 0, count, 0.02))

    async def follow() -> list[str]:
        lines: list[str] = []
        async with llmos.AsyncClient(str(a_machine.runtime)) as client:
            await client.start("counting")
            async for line in client.logs("counting@1", lines=-1, follow=True):
                lines.append(line)
                if len(lines) == count // 3:
                    await asyncio.to_thread(a_machine.kill)
                    await asyncio.to_thread(a_machine.start)
                if line.startswith("llmosd: ended"):
                    return lines
        raise AssertionError("a followed log does not end")

    lines = asyncio.run(asyncio.wait_for(follow(), 100))
    assert len({path.name for path in (a_machine.root / "log").glob("counting@1.log*")}) == 2
    gaps = check_numbers(lines, count)
    # Only as many as there are rotations, and each is told.
    assert gaps <= 5
    assert lines[0].startswith("llmosd: started, pid ") and lines[-1] == "llmosd: ended: exit code 0"


def test_a_log_is_followed_over_lives_of_its_worker_which_are_told_apart(a_machine: Machine) -> None:
    a_machine.start()
    client = a_machine.client
    lives = 3
    rest = f'[restart]\npolicy = "always"\ndelay = "50ms"\ndelay_max = "50ms"\nburst = {lives}\n'
    client.apply(command(["sh", "-c", "echo I am $$; exit 3"], name="short-lived", rest=rest))
    client.start("short-lived")
    a_machine.wait_worker("short-lived@1", "failed")
    lines = done(a_machine, "logs", "short-lived@1").splitlines()
    assert len(lines) == 3 * lives
    for started, said, ended in zip(lines[::3], lines[1::3], lines[2::3], strict=True):
        assert started.replace("llmosd: started, pid", "I am") == said
        assert ended == "llmosd: ended: exit code 3"


def test_ps_says_how_a_command_ended_with_its_last_line(a_machine: Machine) -> None:
    a_machine.start()
    client = a_machine.client
    client.apply(command(["sh", "-c", "echo tuning; echo the bow is broken >&2; exit 3"], name="dying", rest=ONCE))
    client.start("dying")
    assert a_machine.wait_worker("dying@1", "failed").why == "exit code 3; its last line: the bow is broken"
    assert a_machine.worker("dying@1").last_exit == "exit code 3; its last line: the bow is broken"


def test_the_log_of_a_dead_worker_is_there_after_its_daemon_and_after_its_model(a_machine: Machine) -> None:
    a_machine.start()
    client = a_machine.client
    client.apply(command(["echo", "hello and goodbye"], name="brief", rest=ONCE))
    client.start("brief")
    a_machine.wait_worker("brief@1", "stopped")
    before = done(a_machine, "logs", "brief@1")
    assert "hello and goodbye" in before
    assert a_machine.stop() == 0
    a_machine.start()
    assert done(a_machine, "logs", "brief@1") == done(a_machine, "logs", "brief") == before
    done(a_machine, "rm", "brief")
    assert done(a_machine, "logs", "brief@1") == done(a_machine, "logs", "brief") == before


def test_what_a_worker_prints_while_there_is_no_daemon_is_in_its_log_once(a_machine: Machine) -> None:
    a_machine.start()
    client = a_machine.client
    client.apply(counting("steady", 0, 10**9, 0.2))
    client.start("steady")
    wait_number(a_machine, 0)
    reader = log_writer(a_machine)
    a_machine.kill()
    meanwhile = wait_number(a_machine, wait_number(a_machine, 0) + 1000)
    a_machine.start()
    wait_number(a_machine, meanwhile)
    a_machine.client.stop("steady")
    a_machine.wait_worker("steady@1", "stopped")
    assert log_writer(a_machine) == reader
    found = numbers(done(a_machine, "logs", "-n", "all", "steady").splitlines())
    assert found == list(range(len(found))) and len(found) > meanwhile


def test_workers_survive_the_death_of_daemon_and_log_writer_at_once(a_machine: Machine) -> None:
    a_machine.model(SIMULATED)
    a_machine.start()
    client = a_machine.client
    client.apply(counting("steady", 0, 10**9, 0.1))
    for name in ("steady", "sim"):
        client.wait(client.start(name).workers)
    before = {worker.name: worker.pid for worker in client.ps()}
    reader = log_writer(a_machine)
    assert a_machine.daemon is not None
    os.kill(reader, signal.SIGSTOP)  # so that it cannot see the daemon's end first
    a_machine.kill()
    os.kill(reader, signal.SIGKILL)
    wait_for("end of the log writer", lambda: not log_writer(a_machine))
    time.sleep(1)  # time to print into a pipe that nobody reads, and to die of it
    a_machine.start()
    client = a_machine.client
    assert {worker.name: worker.pid for worker in client.ps()} == before
    assert client.run("sim", "one two", max_tokens=2).completion_tokens == 2
    wait_number(a_machine, wait_number(a_machine, 0) + 1000)
    client.stop("steady")
    a_machine.wait_worker("steady@1", "stopped")
    found = numbers(done(a_machine, "logs", "-n", "all", "steady").splitlines())
    # At most what the log writer had read and not written is gone.
    assert len(found) >= found[-1] - (64 << 10) / 50 and found == sorted(set(found))


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="mounting a small disk needs root")
def test_a_full_disk_costs_lines_which_are_counted_and_nothing_else(a_machine: Machine) -> None:
    logs = a_machine.root / "log"
    logs.mkdir()
    script = f'mount -t tmpfs -o size=256k none {logs} && exec "$@"'
    a_machine.prefix = ("unshare", "--mount", "sh", "-c", script, "sh")
    a_machine.start()
    assert a_machine.daemon is not None
    disk = Path(f"/proc/{a_machine.daemon.pid}/root{logs}")
    (disk / "filler").write_bytes(b"x" * (128 << 10))
    client = a_machine.client
    client.apply(openai("loud", "openai_like.py", "--port", "{port}", "--print-bytes", "1000000"))
    client.apply(counting("counting", 0, 10**9, 0.2))
    for name in ("loud", "counting"):
        client.start(name)
        a_machine.wait_worker(f"{name}@1", "ready")
    before = {worker.name: worker.pid for worker in client.ps()}
    wait_for("lines that are dropped", lambda: client.status().counters["log_lines_dropped"] > 1000)
    assert client.run("loud", "are you there", max_tokens=2, timeout=20).text == " w0 w1"
    (disk / "filler").unlink()

    def told() -> list[str]:
        lines = (disk / "counting@1.log").read_text().splitlines() + (disk / "loud@1.log").read_text().splitlines()
        return [line for line in lines if line.startswith("llmosd: ") and "No space left on device" in line]

    (first, *_) = wait_for("line that says so", told)
    assert first.endswith(" lines were dropped: No space left on device")
    assert {worker.name: worker.pid for worker in client.ps()} == before
    client.stop("counting")
    client.stop("loud")
    for name in ("loud", "counting"):
        a_machine.wait_worker(f"{name}@1", "stopped")

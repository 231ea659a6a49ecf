"""The log writer as its own process: what it reads goes on whoever dies, and reaches the journal with its fields."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest
from machine import DEADLINE_S, wait_for

from llmosd.node import logwriter
from llmosd.node.logwriter import LogWriter
from llmosd.node.output import Output

#: Prints what it is told to, on and on; a pipe without a reader would end it.
PARROT = "import sys\nfor line in sys.stdin: print(line, end='', flush=True)"


@pytest.fixture
def root() -> Iterator[Path]:
    # Not pytest's tmp_path: sockets' paths must be short.
    with tempfile.TemporaryDirectory(prefix="llmosd-t-", dir="/tmp") as directory:
        yield Path(directory)


@pytest.fixture
def journald(root: Path) -> Iterator[socket.socket]:
    """Stands in for systemd's: the same socket, read by the test."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.bind(str(root / "journal"))
        end.settimeout(DEADLINE_S)
        yield end


@asynccontextmanager
async def daemon(root: Path, *, to_journal: bool = False) -> AsyncIterator[LogWriter]:
    """What a daemon has of the log writer, from its start to its end."""
    warned: list[str] = []
    writer = LogWriter(
        root, root / "logs.sock", 1 << 20, to_journal=to_journal, warn=warned.append, journal=root / "journal"
    )
    try:
        yield writer
    finally:
        await writer.close()


async def parrot(output: Output) -> subprocess.Popen[bytes]:
    return printing(await output.open(), sys.executable, "-c", PARROT)


def printing(fd: int, *argv: str) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=fd, stderr=fd)
    finally:
        os.close(fd)


def say(process: subprocess.Popen[bytes], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{line}\n".encode())
    process.stdin.flush()


async def lines_of(output: Output, last: str) -> list[str]:
    """The log, once it has that line."""

    def look() -> list[str]:
        lines = output.path.read_text().splitlines() if output.path.exists() else []
        return lines if last in lines else []

    return await asyncio.to_thread(wait_for, f"line {last!r}", look)


def alone(root: Path, test: Callable[[], Awaitable[None]]) -> None:
    """Run a test, and check that it left neither a log writer nor its socket."""
    asyncio.run(asyncio.wait_for(test(), 2 * DEADLINE_S))  # type: ignore[arg-type]
    wait_for("end of the log writer", lambda: not writers(root))
    assert not (root / "logs.sock").exists()


def writers(root: Path) -> list[int]:
    path = os.fsencode(root / "logs.sock")
    found = []
    for process in psutil.process_iter():
        try:
            if path in Path(f"/proc/{process.pid}/cmdline").read_bytes().split(b"\0"):
                found.append(process.pid)
        except OSError:
            continue
    return found


def test_what_a_worker_prints_is_written_and_its_last_line_told(root: Path) -> None:
    async def test() -> None:
        async with daemon(root) as writer:
            output = writer.output("m@1", "m")
            process = await parrot(output)
            await output.say(f"started, pid {process.pid}")
            say(process, "one")
            say(process, "")
            process.communicate(b"the bow is broken\n\n")
            assert await output.end("ended: exit code 0") == "the bow is broken"
            assert output.path.read_text().splitlines() == [
                f"llmosd: started, pid {process.pid}", "one", "", "the bow is broken", "", "llmosd: ended: exit code 0",
            ]  # fmt: skip

    alone(root, test)


def test_a_log_writer_that_is_killed_is_replaced_and_nothing_that_waits_in_the_pipe_is_lost(root: Path) -> None:
    async def test() -> None:
        async with daemon(root) as writer:
            output = writer.output("m@1", "m")
            process = await parrot(output)
            say(process, "before")
            await lines_of(output, "before")
            for round_ in range(3):
                os.kill(writer.pid, signal.SIGKILL)
                say(process, f"meanwhile {round_}")
                await lines_of(output, f"meanwhile {round_}")
            process.communicate(b"last\n")
            assert await output.end("ended") == "last"
            lines = ["before", "meanwhile 0", "meanwhile 1", "meanwhile 2", "last", "llmosd: ended"]
            assert output.path.read_text().splitlines() == lines

    alone(root, test)


def test_the_log_writer_outlives_its_daemon_and_the_next_one_finds_it(root: Path) -> None:
    async def test() -> None:
        async with daemon(root) as first:
            output = first.output("m@1", "m")
            process = await parrot(output)
            await output.say("started")
            pid = first.pid
        say(process, "nobody watches")
        await lines_of(output, "nobody watches")
        async with daemon(root) as second:
            again = second.output("m@1", "m")
            assert await again.take_up(output.inode, list) == ""
            assert (second.pid, again.read_end >= 0) == (pid, True)
            # And is protected again by the second one.
            os.kill(pid, signal.SIGKILL)
            say(process, "after")
            await lines_of(again, "after")
            process.communicate()
            await again.end("ended")
        output.close()

    alone(root, test)


def test_a_worker_whose_daemon_and_log_writer_are_both_killed_lives_and_is_read_again(root: Path) -> None:
    async def test() -> None:
        async with daemon(root) as first:
            output = first.output("m@1", "m")
            process = await parrot(output)
            say(process, "before")
            await lines_of(output, "before")
            output.close()  # the daemon's descriptor goes with it
            pid = first.pid
        os.kill(pid, signal.SIGKILL)
        wait_for("end of the log writer", lambda: not writers(root))
        say(process, "nobody reads")
        async with daemon(root) as second:
            again = second.output("m@1", "m")
            assert await again.take_up(output.inode, lambda: [process.pid]) == ""
            assert await lines_of(again, "nobody reads") == ["before", "nobody reads"]
            assert process.poll() is None
            process.communicate()
            await again.end("ended")

    alone(root, test)


def test_a_log_writer_that_stands_still_is_replaced_and_delays_nobody_for_long(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with daemon(root) as writer:
            output = writer.output("m@1", "m")
            process = await parrot(output)
            stuck = writer.pid
            os.kill(stuck, signal.SIGSTOP)
            monkeypatch.setattr(logwriter, "ANSWER_S", 1.0)
            await output.say("not heard")
            monkeypatch.undo()
            say(process, "meanwhile")
            await lines_of(output, "meanwhile")
            assert writer.pid != stuck
            process.communicate()
            await output.end("ended")

    alone(root, test)


def test_one_log_writer_reads_them_all_and_gives_each_its_turn(root: Path) -> None:
    async def test() -> None:
        async with daemon(root) as writer:
            loud = writer.output("loud@1", "loud")
            flood = printing(await loud.open(), "yes", "x" * 99)
            output = writer.output("quiet@1", "quiet")
            process = await parrot(output)
            for number in range(20):
                say(process, str(number))
                await lines_of(output, str(number))
            flood.kill()
            flood.wait()
            process.communicate()
            await asyncio.gather(loud.end("ended"), output.end("ended"))
            assert sum(path.stat().st_size for path in root.glob("loud@1.log*")) <= 1 << 20

    alone(root, test)


def test_the_journal_gets_a_workers_lines_with_its_fields_and_still_after_a_restart(
    root: Path, journald: socket.socket
) -> None:
    def entry() -> dict[str, str]:
        return dict(line.split("=", 1) for line in journald.recv(1 << 16).decode().splitlines())

    async def test() -> None:
        async with daemon(root, to_journal=True) as writer:
            output = writer.output("gemma@1", "gemma")
            process = await parrot(output)
            fields = {"LLMOS_WORKER": "gemma@1", "LLMOS_MODEL": "gemma", "SYSLOG_IDENTIFIER": "llmos", "PRIORITY": "6"}
            say(process, "one")
            assert await asyncio.to_thread(entry) == fields | {"MESSAGE": "one"}
            os.kill(writer.pid, signal.SIGKILL)
            say(process, "two")
            assert await asyncio.to_thread(entry) == fields | {"MESSAGE": "two"}
            process.communicate()
            await output.end("ended: exit code 0")
            assert (await asyncio.to_thread(entry))["MESSAGE"] == "llmosd: ended: exit code 0"
            assert writer.counts() == {"log_lines_dropped": 0, "journal_lines_dropped": 0}

    alone(root, test)

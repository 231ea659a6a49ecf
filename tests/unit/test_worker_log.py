"""A host's way to the log writer: it never waits there, and what is dropped is counted in the log itself."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator

import pytest

from llmosd.worker import log as module
from llmosd.worker.log import WorkerLog

LINE = b"x" * 99 + b"\n"
#: More than a pipe holds.
FLOOD = LINE * 1000


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """(its reading end, its writing end)"""
    ends = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    yield ends
    for fd in ends:
        os.close(fd)


def read_all(fd: int) -> bytes:
    data = b""
    while True:
        try:
            data += os.read(fd, 1 << 16)
        except BlockingIOError:
            return data


def test_what_finds_no_room_waits_for_it_and_is_whole(pipe: tuple[int, int]) -> None:
    async def flood() -> bytes:
        log = WorkerLog(pipe[1])
        log.write(FLOOD)
        assert log.is_full
        room = asyncio.Event()
        log.when_room(room.set)
        seen = b""
        while not room.is_set():
            seen += read_all(pipe[0])
            await asyncio.sleep(0)
        assert not log.is_full
        log.say("the engine is ready")
        return seen + read_all(pipe[0])

    assert asyncio.run(flood()) == FLOOD + b"llmosd: the engine is ready\n"


def test_a_log_that_nobody_reads_costs_lines_and_says_how_many_once_it_is_read(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PATIENCE_S", 0.01)

    async def flood() -> bytes:
        log = WorkerLog(pipe[1])
        log.write(FLOOD)
        patience = asyncio.Event()
        log.when_room(patience.set)
        await asyncio.wait_for(patience.wait(), 10)
        assert not log.is_full  # from here on it does not wait at all
        log.write(FLOOD)
        assert not log.is_full
        read = read_all(pipe[0])
        log.write(b"last\n")
        return read + read_all(pipe[0])

    seen = asyncio.run(flood())
    *lines, told, last = seen.splitlines()
    whole = sum(line == LINE[:-1] for line in lines)
    assert last == b"last"
    dropped = int(told.split()[1])
    assert told == b"llmosd: %d lines were dropped: the log was not read" % dropped
    # A line that was cut counts as dropped.
    assert whole + dropped == 2000


def test_the_last_lines_are_kept_for_the_reason_of_the_end(pipe: tuple[int, int]) -> None:
    async def tail() -> list[str]:
        log = WorkerLog(pipe[1])
        log.write(b"one\n\ntwo\nthe bow is broken\n")
        return list(log.tail)

    assert asyncio.run(tail()) == ["one", "two", "the bow is broken"]

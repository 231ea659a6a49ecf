"""Logs read from their end and followed: lines are neither lost nor cut, over rotation, and never without bound."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

from llmosd.control.logs import follow_log


async def whole(path: Path, lines: int) -> list[str]:
    return [line async for message in follow_log(path, lines, follow=False) for line in message]


async def take(log: AsyncIterator[list[str]], count: int) -> list[str]:
    """The next `count` lines."""
    lines: list[str] = []
    async with asyncio.timeout(10):
        while len(lines) < count:
            lines += await anext(log)
    return lines


def test_the_last_lines_are_found_and_reach_into_the_older_file(tmp_path: Path) -> None:
    log = tmp_path / "w.log"
    log.write_text("c\nd\n")
    (tmp_path / "w.log.1").write_text("a\nb\n")
    assert asyncio.run(whole(log, 1)) == ["d"]
    assert asyncio.run(whole(log, 3)) == ["b", "c", "d"]
    assert asyncio.run(whole(log, -1)) == ["a", "b", "c", "d"]
    assert asyncio.run(whole(tmp_path / "none.log", 3)) == []


def test_a_line_without_an_end_is_shown_when_nobody_follows(tmp_path: Path) -> None:
    log = tmp_path / "w.log"
    log.write_text("a\nunfini")
    assert asyncio.run(whole(log, 2)) == ["a", "unfini"]


def test_a_line_is_followed_to_its_end(tmp_path: Path) -> None:
    log = tmp_path / "w.log"
    log.write_text("a\nunfini")

    async def follow() -> list[str]:
        lines = follow_log(log, 10, follow=True)
        first = await take(lines, 1)
        with log.open("a") as file:
            file.write("shed\r 50%\u2028x\nnext\n")
        return first + await take(lines, 2)

    assert asyncio.run(follow()) == ["a", "unfinished\r 50%\u2028x", "next"]


def test_nothing_is_lost_when_the_file_is_rotated_while_it_is_followed(tmp_path: Path) -> None:
    log = tmp_path / "w.log"
    log.write_text("0\n")

    async def follow() -> list[str]:
        lines = follow_log(log, 10, follow=True)
        seen = await take(lines, 1)
        with log.open("a") as file:
            file.write("1\n")
        log.rename(tmp_path / "w.log.1")
        log.write_text("2\n")
        seen += await take(lines, 2)
        with log.open("a") as file:
            file.write("3\n")
        return seen + await take(lines, 1)

    assert asyncio.run(follow()) == ["0", "1", "2", "3"]


def test_a_line_that_never_ends_comes_in_pieces_and_messages_stay_small(tmp_path: Path) -> None:
    log = tmp_path / "w.log"
    log.write_bytes(b"x" * (3 << 20))

    async def first() -> list[list[str]]:
        return [message async for message in follow_log(log, -1, follow=False)]

    messages = asyncio.run(first())
    assert sum(len(line) for message in messages for line in message) == 3 << 20
    assert max(sum(map(len, message)) for message in messages) < 1 << 20

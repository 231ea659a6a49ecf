"""Logs read from their end and followed: lines are neither lost nor cut, over rotation, and never without bound."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path

from llmosd.control.logs import Lines, follow_log
from llmosd.logs.file import HALF_MIN, Drops, LogFile


async def whole(path: Path, lines: int, after: int | None = None) -> list[str]:
    return [line async for message in follow_log(path, lines, follow=False, after=after) for line in message.lines]


async def take(log: AsyncIterator[Lines], count: int) -> list[str]:
    """The next `count` lines."""
    lines: list[str] = []
    async with asyncio.timeout(10):
        while len(lines) < count:
            lines += (await anext(log)).lines
    return lines


def log_file(path: Path, max_bytes: int = 2 * HALF_MIN) -> LogFile:
    return LogFile(str(path), max_bytes, Drops())


def numbered(start: int, stop: int) -> bytes:
    """Lines of 100 bytes: 40 fill a file of the smallest cap."""
    return b"".join(b"%099d\n" % number for number in range(start, stop))


def numbers(lines: list[str]) -> list[int]:
    return [int(line) for line in lines if line.isdecimal()]


def test_the_last_lines_are_found_and_reach_into_the_older_file(tmp_path: Path) -> None:
    path = tmp_path / "w.log"
    log_file(path).write(numbered(0, 60))
    assert numbers(asyncio.run(whole(path, 1))) == [59]
    assert numbers(asyncio.run(whole(path, 50))) == list(range(10, 60))
    assert numbers(asyncio.run(whole(path, -1))) == list(range(60))
    assert asyncio.run(whole(tmp_path / "none.log", 3)) == []


def test_files_of_an_earlier_version_are_read_as_well(tmp_path: Path) -> None:
    log = tmp_path / "w.log"
    log.write_text("c\nd\n")
    (tmp_path / "w.log.1").write_text("a\nb\n")
    assert asyncio.run(whole(log, 1)) == ["d"]
    assert asyncio.run(whole(log, 3)) == ["b", "c", "d"]
    assert asyncio.run(whole(log, -1)) == ["a", "b", "c", "d"]


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


def test_a_log_that_does_not_exist_yet_is_followed_from_its_first_line(tmp_path: Path) -> None:
    path = tmp_path / "w.log"

    async def follow() -> list[str]:
        lines = follow_log(path, 10, follow=True)
        assert (await anext(lines)) == Lines([], 0)
        log_file(path).write(b"first\n")
        return await take(lines, 1)

    assert asyncio.run(follow()) == ["first"]


def test_nothing_is_lost_when_the_file_is_rotated_while_it_is_followed(tmp_path: Path) -> None:
    path = tmp_path / "w.log"
    log = log_file(path)
    log.write(numbered(0, 30))

    async def follow() -> list[str]:
        lines = follow_log(path, 10, follow=True)
        seen = await take(lines, 10)
        log.write(numbered(30, 60))
        seen += await take(lines, 30)
        log.write(numbered(60, 61))
        return seen + await take(lines, 1)

    assert numbers(asyncio.run(follow())) == list(range(20, 61))


def test_a_reader_two_rotations_behind_reads_on_and_is_told_how_much_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "w.log"
    log = log_file(path)
    log.write(numbered(0, 30))

    async def follow() -> list[str]:
        lines = follow_log(path, 1, follow=True)
        seen = await take(lines, 1)
        log.write(numbered(30, 150))  # the file it has open, and two more that are gone
        return seen + await take(lines, 60)

    seen = asyncio.run(follow())
    (told,) = [line for line in seen if not line.isdecimal()]
    found = numbers(seen)
    before = found[: seen.index(told)]
    after = found[len(before) :]
    assert before == list(range(29, before[-1] + 1)) and after == list(range(after[0], 150))
    missed = (after[0] - before[-1] - 1) * 100
    assert missed > 0 and told == f"llmosd: {missed} bytes of this log were gone before they could be read"


def test_who_was_away_goes_on_where_he_was(tmp_path: Path) -> None:
    path = tmp_path / "w.log"
    log = log_file(path)
    log.write(numbered(0, 30))

    async def position() -> int:
        return (await anext(follow_log(path, 5, follow=True))).position

    place = asyncio.run(position())
    log.write(numbered(30, 65))
    assert numbers(asyncio.run(whole(path, 1, after=place))) == list(range(30, 65))
    log.write(numbered(65, 200))
    told, *rest = asyncio.run(whole(path, 1, after=place))
    assert "bytes of this log were gone" in told
    assert numbers(rest) == list(range(numbers(rest)[0], 200))


def test_any_cut_between_two_messages_loses_and_repeats_nothing(tmp_path: Path) -> None:
    path = tmp_path / "w.log"
    log_file(path, 1 << 20).write(numbered(0, 2000))
    dice = random.Random(1)

    async def in_pieces() -> list[str]:
        seen: list[str] = []
        place: int | None = None
        while len(seen) < 2000:
            messages = follow_log(path, -1, follow=True, after=place)
            for _ in range(dice.randrange(1, 4)):
                message = await anext(messages)
                seen += message.lines
                place = message.position
                if len(seen) >= 2000:
                    break
        return seen

    assert numbers(asyncio.run(in_pieces())) == list(range(2000))


def test_a_line_that_never_ends_comes_in_pieces_and_messages_stay_small(tmp_path: Path) -> None:
    log = tmp_path / "w.log"
    log.write_bytes(b"x" * (3 << 20))

    async def first() -> list[Lines]:
        return [message async for message in follow_log(log, -1, follow=False)]

    messages = asyncio.run(first())
    assert sum(len(line) for message in messages for line in message.lines) == 3 << 20
    assert max(sum(map(len, message.lines)) for message in messages) < 1 << 20
    assert messages[-1].position == 3 << 20

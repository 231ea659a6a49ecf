"""A worker's log file, read from its end and followed over rotations and restarts. Reads happen in a thread.

A line ends with a line feed and nothing else: what engines draw progress bars with stays inside it. One that never ends
is given out in pieces, so that whoever prints a gigabyte without a line break costs a follower no more than a piece.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Final

#: Seconds between two looks at a file that somebody follows.
LOOK_S: Final = 0.1
_BLOCK: Final = 64 << 10
_LINE_MAX: Final = 64 << 10
#: A message has so many lines and so many bytes, or a little more.
_LINES_A_MESSAGE: Final = 500
_BYTES_A_MESSAGE: Final = 256 << 10
#: What is read at most to find the last lines.
_TAIL_MAX: Final = 8 << 20


async def follow_log(path: Path, lines: int, *, follow: bool) -> AsyncIterator[list[str]]:
    """The last `lines` lines (negative: all that are kept), then, with `follow`, what is written from then on."""
    data, offset, inode = await asyncio.to_thread(_tail, path, lines)
    complete, rest = _split(data)
    if not follow and rest:
        complete.append(rest)
    if lines >= 0:
        complete = complete[len(complete) - min(lines, len(complete)) :]
    for message in _messages(complete):
        yield message
    while follow:
        data, offset, inode = await asyncio.to_thread(_more, path, offset, inode)
        if not data:
            await asyncio.sleep(LOOK_S)
            continue
        complete, rest = _split(rest + data)
        for message in _messages(complete):
            yield message


def _split(data: bytes) -> tuple[list[bytes], bytes]:
    """(complete lines, what is left)"""
    *lines, rest = data.split(b"\n")
    pieces = [line[start : start + _LINE_MAX] for line in lines for start in range(0, max(1, len(line)), _LINE_MAX)]
    while len(rest) >= _LINE_MAX:
        pieces.append(rest[:_LINE_MAX])
        rest = rest[_LINE_MAX:]
    return pieces, rest


def _messages(lines: list[bytes]) -> Iterator[list[str]]:
    message: list[str] = []
    size = 0
    for line in lines:
        message.append(line.decode(errors="replace"))
        size += len(line)
        if len(message) >= _LINES_A_MESSAGE or size >= _BYTES_A_MESSAGE:
            yield message
            message, size = [], 0
    if message:
        yield message


def _tail(path: Path, lines: int) -> tuple[bytes, int, int]:
    """(what surely has the lines in it, where the file goes on, which file it is)"""
    older = path.with_name(path.name + ".1")
    try:
        stat = path.stat()
    except FileNotFoundError:
        return _read(older, 0)[0], 0, 0
    data, offset = _read(path, 0 if lines < 0 else max(0, stat.st_size - _TAIL_MAX))
    if lines < 0 or data.count(b"\n") <= lines:
        data = _read(older, 0)[0] + data
    return data, offset, stat.st_ino


def _read(path: Path, offset: int) -> tuple[bytes, int]:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read()
            return data, offset + len(data)
    except OSError:
        return b"", offset


def _more(path: Path, offset: int, inode: int) -> tuple[bytes, int, int]:
    """What was written since; a file that was rotated away is read to its end first."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return b"", 0, 0
    if inode and stat.st_ino != inode:
        older = path.with_name(path.name + ".1")
        rest = b""
        if older.exists() and older.stat().st_ino == inode:
            rest, _ = _read(older, offset)
        return rest, 0, stat.st_ino
    if stat.st_size < offset:  # cut in place
        offset = 0
    with path.open("rb") as file:
        data = os.pread(file.fileno(), _BLOCK, offset)
    return data, offset + len(data), stat.st_ino

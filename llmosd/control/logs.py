"""A worker's log file, read from its end and followed over rotations and restarts. Reads happen in a thread."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

#: Seconds between two looks at a file that somebody follows.
LOOK_S: Final = 0.1
_BLOCK: Final = 64 << 10
_LINES_A_MESSAGE: Final = 500
#: What is read at most to find the last lines.
_TAIL_MAX: Final = 8 << 20


async def follow_log(path: Path, lines: int, *, follow: bool) -> AsyncIterator[list[str]]:
    """The last `lines` lines (negative: all that are kept), then, with `follow`, what is written from then on."""
    last, offset, inode = await asyncio.to_thread(_tail, path, lines)
    for start in range(0, len(last), _LINES_A_MESSAGE):
        yield last[start : start + _LINES_A_MESSAGE]
    rest = b""
    while follow:
        data, offset, inode = await asyncio.to_thread(_more, path, offset, inode)
        if not data:
            await asyncio.sleep(LOOK_S)
            continue
        *complete, rest = (rest + data).split(b"\n")
        if complete:
            yield [line.decode(errors="replace") for line in complete]


def _tail(path: Path, lines: int) -> tuple[list[str], int, int]:
    older = _read(path.with_name(path.name + ".1"), 0)[0] if lines < 0 else b""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return older.decode(errors="replace").splitlines(), 0, 0
    data, offset = _read(path, 0 if lines < 0 else max(0, stat.st_size - _TAIL_MAX))
    text = (older + data).decode(errors="replace").splitlines()
    if lines >= 0:
        if len(text) < lines:
            text = _read(path.with_name(path.name + ".1"), 0)[0].decode(errors="replace").splitlines() + text
        text = text[-lines:]
    return text, offset, stat.st_ino


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

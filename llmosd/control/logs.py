"""A worker's log, read from its end and followed over rotations and restarts. Reads happen in a thread.

A place in a log is its position: how many bytes were written before it, in all files that there ever were. Each file
says with which it begins (`llmosd.logs.file`), so a reader who was away or is too slow knows exactly what he missed,
and is told. A line ends with a line feed and nothing else: what engines draw progress bars with stays inside it. One
that never ends is given out in pieces, so that whoever prints a gigabyte without a line break costs a follower no more
than a piece.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from llmosd.logs.file import HEADER_MAX, header, older

#: Seconds between two looks at a file that somebody follows.
LOOK_S: Final = 0.1
_BLOCK: Final = 256 << 10
_LINE_MAX: Final = 64 << 10
#: A message has so many lines and so many bytes, or a little more.
_LINES_A_MESSAGE: Final = 500
_BYTES_A_MESSAGE: Final = 256 << 10
#: What is read at most to find the last lines.
_TAIL_MAX: Final = 8 << 20
#: Looks at two files that are rotated meanwhile.
_TRIES: Final = 10


class Lines(NamedTuple):
    """Some lines, and the position after them."""

    lines: list[str]
    position: int


class _Line(NamedTuple):
    text: bytes
    #: With its line feed.
    size: int


async def follow_log(path: Path, lines: int, *, follow: bool, after: int | None = None) -> AsyncIterator[Lines]:
    """The last `lines` lines (negative: all that are kept), then, with `follow`, what is written from then on.

    With `after`, what follows that position instead of the last lines.
    """
    reader = _Reader(path)
    try:
        if after is None:
            data, position = await asyncio.to_thread(reader.tail, lines)
            missed = 0
        else:
            data, position, missed = b"", after, await asyncio.to_thread(reader.go_to, after)
        complete, rest = _split(data)
        if not follow and rest:
            complete.append(_Line(rest, len(rest)))
            rest = b""
        if lines >= 0 and after is None:
            position += sum(line.size for line in complete[: max(0, len(complete) - lines)])
            complete = complete[max(0, len(complete) - lines) :]
        if follow and not complete:
            yield Lines([], position)  # from here on, whatever happens to this call
        while True:
            if missed:
                if rest:
                    yield Lines([rest.decode(errors="replace")], position + len(rest))
                rest, position = b"", reader.position
                yield Lines([f"llmosd: {missed} bytes of this log were gone before they could be read"], position)
            for message in _messages(complete, position):
                position = message.position
                yield message
            if after is None and not follow:
                return
            data, missed = await asyncio.to_thread(reader.more)
            if not data and not missed:
                if not follow:
                    return
                await asyncio.sleep(LOOK_S)
            complete, rest = _split(rest + data) if data else ([], rest)
    finally:
        reader.close()


def _split(data: bytes) -> tuple[list[_Line], bytes]:
    """(complete lines, what is left)"""
    *lines, rest = data.split(b"\n")
    pieces: list[_Line] = []
    for line in lines:
        while len(line) > _LINE_MAX:
            pieces.append(_Line(line[:_LINE_MAX], _LINE_MAX))
            line = line[_LINE_MAX:]
        pieces.append(_Line(line, len(line) + 1))
    while len(rest) >= _LINE_MAX:
        pieces.append(_Line(rest[:_LINE_MAX], _LINE_MAX))
        rest = rest[_LINE_MAX:]
    return pieces, rest


def _messages(lines: Iterable[_Line], position: int) -> Iterator[Lines]:
    message: list[str] = []
    size = 0
    for line in lines:
        message.append(line.text.decode(errors="replace"))
        size += line.size
        if len(message) >= _LINES_A_MESSAGE or size >= _BYTES_A_MESSAGE:
            position += size
            yield Lines(message, position)
            message, size = [], 0
    if message:
        yield Lines(message, position + size)


class _File:
    """One file of a log, open: it can be read to its end also when it was rotated away."""

    def __init__(self, path: str) -> None:
        """Raises OSError."""
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        status = os.fstat(self.fd)
        self.identity = (status.st_dev, status.st_ino)
        self.begins, self.header_size = header(os.pread(self.fd, HEADER_MAX, 0))

    @property
    def size(self) -> int:
        return os.fstat(self.fd).st_size

    @property
    def ends(self) -> int:
        """The position after it."""
        return self.begins + max(0, self.size - self.header_size)

    def read(self, position: int, size: int) -> bytes:
        return os.pread(self.fd, size, self.header_size + position - self.begins)


class _Reader:
    """One reader's place in a log. All methods block."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)
        self._file: _File | None = None
        self.position = 0

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file.fd)
            self._file = None

    def tail(self, lines: int) -> tuple[bytes, int]:
        """(what surely has the last lines in it, its position). The reader is then at the log's end."""
        before, current = self._both()
        data, position = b"", 0
        for file in (current, before):
            if file is None or (data and 0 <= lines < data.count(b"\n")):
                continue
            start = file.begins if lines < 0 else max(file.begins, file.ends - _TAIL_MAX)
            data = file.read(start, file.ends - start) + data
            position = start
            if start > file.begins:
                break
        newest = current or before
        self.position = position + len(data)
        self._keep(newest, before, current)
        return data, position

    def go_to(self, position: int) -> int:
        """Go on after a position. Returns how many bytes from there on are gone."""
        before, current = self._both()
        files = [file for file in (before, current) if file is not None]
        # The later of two: the end of one is the beginning of the next.
        at = next((file for file in reversed(files) if file.begins <= position <= file.ends), None)
        if at is not None:
            self.position = position
            self._keep(at, before, current)
            return 0
        oldest = files[0] if files else None
        self.position = oldest.begins if oldest is not None else 0
        self._keep(oldest, before, current)
        # A position beyond the end is of a log that somebody removed: this is another.
        return max(0, self.position - position)

    def more(self) -> tuple[bytes, int]:
        """(what comes next, how many bytes before the reader's new place are gone)"""
        file = self._file
        if file is None:
            return b"", self.go_to(self.position)
        data = file.read(self.position, _BLOCK)
        if not data and self._is_behind(file):
            # Nobody writes to it any more: what was written before it was rotated away is all.
            data = file.read(self.position, _BLOCK)
            if not data:
                missed = self.go_to(self.position)
                if missed or self._file is None:
                    return b"", missed
                file = self._file
                data = file.read(self.position, _BLOCK)
        self.position += len(data)
        if not data and file.ends < self.position:
            file.begins, file.header_size = header(os.pread(file.fd, HEADER_MAX, 0))  # somebody cut it in place
            self.position = file.begins
        return data, 0

    def _is_behind(self, file: _File) -> bool:
        """Whether another file is the current one."""
        try:
            status = Path(self._path).stat()
        except OSError:
            return False  # just being rotated; or removed, and nobody has printed since
        return (status.st_dev, status.st_ino) != file.identity

    def _both(self) -> tuple[_File | None, _File | None]:
        """The older and the current file, as they were at one moment."""
        for _ in range(_TRIES):
            current = _opened(self._path)
            before = _opened(older(self._path))
            if current is None or before is None or before.ends == current.begins:
                break
            if current.header_size == 0 and before.identity != current.identity:
                break  # somebody else rotated it: nothing says what follows what
            for file in (before, current):
                os.close(file.fd)
        else:
            return None, _opened(self._path)
        return before, current

    def _keep(self, chosen: _File | None, *opened: _File | None) -> None:
        self.close()
        self._file = chosen
        for file in opened:
            if file is not None and file is not chosen:
                os.close(file.fd)


def _opened(path: str) -> _File | None:
    try:
        return _File(path)
    except OSError:
        return None

"""What a command prints, read line by line out of its log file until it is ready; and expressions found in it.

For the node. A line is what ends with a line feed or a carriage return, with which progress bars are drawn. It must
never read without bound: of a line `LINE_MAX` bytes count, and who prints faster than is read has lines left out.
"""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Iterable
from io import FileIO
from pathlib import Path
from types import FrameType
from typing import Final

#: Bytes of a line that are looked at.
LINE_MAX: Final = 4096
#: Bytes that are read at once.
READ_MAX: Final = 256 << 10
#: Seconds of CPU time that finding an expression in what was read at once may take: a dozen times what is usual.
_SEARCH_S: Final = 0.1
_LINE_END: Final = re.compile(rb"[\r\n]")


def size_of(path: Path) -> int:
    """Bytes in a file; 0 where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


class _Source:
    """An open file, and how far it was read."""

    def __init__(self, file: FileIO, offset: int) -> None:
        self.file = file
        self.inode = os.fstat(file.fileno()).st_ino
        self.offset = offset

    def more(self) -> bytes:
        if os.fstat(self.file.fileno()).st_size < self.offset:
            self.offset = 0  # somebody has cut it in place
        data = os.pread(self.file.fileno(), READ_MAX, self.offset)
        self.offset += len(data)
        return data


class Printed:
    """One log file from `start` on. `read` may block, and belongs in a thread.

    It goes on over rotations: a file that has another name now is read on for as long as it may be written to, besides
    the new one. Who prints faster than is read, over two rotations, has lines left out.
    """

    def __init__(self, path: Path, start: int) -> None:
        self._path = path
        self._start = start
        self._sources: list[_Source] = []
        self._rest = b""
        #: What comes is left of a line of which enough was seen.
        self._skipping = False
        self._lock = threading.Lock()

    def read(self) -> tuple[bool, list[bytes]]:
        """(whether anything was printed, the lines that ended) since the last read."""
        with self._lock:
            try:
                self._open_new()
                data = b"".join([source.more() for source in self._sources])
                lines = self._lines(data)
            except OSError:
                return False, []  # it was deleted, say: the next read tries again
            return bool(data), lines

    def close(self) -> None:
        with self._lock:
            for source in self._sources:
                source.file.close()
            self._sources.clear()

    def _open_new(self) -> None:
        try:
            inode = self._path.stat().st_ino
        except FileNotFoundError:
            return  # rotated, and there is no new one yet
        if self._sources and self._sources[-1].inode == inode:
            return
        self._sources.append(_Source(FileIO(self._path), 0 if self._sources else self._start))
        for source in self._sources[:-2]:
            source.file.close()
        del self._sources[:-2]

    def _lines(self, data: bytes) -> list[bytes]:
        *ended, rest = _LINE_END.split(self._rest + data)
        if ended and self._skipping:
            del ended[0]
            self._skipping = False
        lines = [line[:LINE_MAX] for line in ended if line]
        if self._skipping:
            rest = b""
        elif len(rest) >= LINE_MAX:
            lines.append(rest[:LINE_MAX])
            self._skipping, rest = True, b""
        self._rest = rest
        return lines


class TooSlow(Exception):  # noqa: N818  # it is what became of a search
    """An expression takes so long that the daemon would stand still: it backtracks without end."""


class Expression:
    """A regular expression that cannot stop the daemon.

    `re` has no time limit, and holds the interpreter while it searches: in a thread it would stop all others the same.
    But it looks for signals now and then where it runs in the main thread; so a timer of the process's CPU time ends a
    search that takes too long. Of the 4,096 steps between two looks nobody notices anything.
    """

    def __init__(self, text: str) -> None:
        """Raises re.error."""
        self._expression = re.compile(text)

    def found_in(self, lines: Iterable[bytes]) -> bool:
        """Whether it is found in one of the lines. In the main thread only. Raises TooSlow."""
        searching = True

        def interrupt(number: int, frame: FrameType | None) -> None:
            if searching:
                raise TooSlow

        before = signal.signal(signal.SIGVTALRM, interrupt)
        try:
            signal.setitimer(signal.ITIMER_VIRTUAL, _SEARCH_S)
            try:
                return any(self._expression.search(line.decode(errors="replace")) for line in lines)
            finally:
                searching = False
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        finally:
            signal.signal(signal.SIGVTALRM, before)

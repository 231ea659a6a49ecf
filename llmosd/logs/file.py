"""A worker's log file: capped, one older file beside it, and honest about what it could not take.

For the log writer; who reads logs uses `header`. Nothing here raises OSError for what happens to the disk: a file that
cannot be written costs lines, which are counted, and the file says how many as soon as it can be written again.
"""

from __future__ import annotations

import errno
import os
import re

#: Smaller halves of the cap would be nothing but headers.
HALF_MIN = 4096
_HEADER = b"llmosd: this log goes on from byte %d\n"
_HEADER_PATTERN = re.compile(rb"llmosd: this log goes on from byte (\d+)\n")
#: What must be read of a file to know its header.
HEADER_MAX = 64


def header(start: bytes) -> tuple[int, int]:
    """(which byte of the log a file begins with, bytes of the header that says so), from how the file starts.

    The first file of a log has no header, and begins with byte 0.
    """
    match = _HEADER_PATTERN.match(start)
    return (int(match[1]), match.end()) if match else (0, 0)


def older(path: str) -> str:
    """Where the older file of a log is."""
    return path + ".1"


class Drops:
    """How many lines of all logs could not be written, ever."""

    lines = 0


class LogFile:
    """See the module. The file is opened when something is to be written, and again when somebody removed it."""

    def __init__(self, path: str, max_bytes: int, drops: Drops) -> None:
        self.path = path
        self.half_bytes = 0
        self.set_cap(max_bytes)
        self._drops = drops
        #: Lines that could not be written, and of which the file does not speak yet.
        self.unsaid = 0
        self._why = ""
        self._fd = -1
        #: Which byte of the log the file begins with, the size of its header, and how many bytes the log has.
        self._base = 0
        self._header_size = 0
        self._end = -1
        self._ends_within_line = False

    def set_cap(self, max_bytes: int) -> None:
        """`max_bytes`: what both files may take together."""
        self.half_bytes = max(HALF_MIN, max_bytes // 2)

    def write(self, data: bytes) -> None:
        """Append."""
        if not self.settle():
            self._drop(data)
            return
        while data:
            try:
                size = self._open()
                piece = self._fitting(data, size)
                if not piece:
                    self._rotate()
                    continue
                written = os.write(self._fd, piece)
            except OSError as error:
                self._why = os.strerror(error.errno or 0)
                self._drop(data)
                return
            self._end += written
            self._ends_within_line = data[written - 1] != 0x0A
            data = data[written:]

    def say(self, text: str) -> None:
        """A line of llmosd's own, on a line of its own."""
        start = b"\n" if self._ends_within_line else b""
        self.write(start + f"llmosd: {text}\n".encode())

    def settle(self) -> bool:
        """Say how many lines were dropped, if any were. False: nothing can be written yet."""
        if not self.unsaid:
            return True
        start = b"\n" if self._ends_within_line else b""
        line = start + f"llmosd: {self.unsaid} lines were dropped: {self._why}\n".encode()
        try:
            size = self._open()
            if size + len(line) > self.half_bytes:
                self._rotate()
                size = self._open()
            self._write_whole(line, size)
        except OSError as error:
            self._why = os.strerror(error.errno or 0)
            return False
        self.unsaid = 0
        self._end += len(line)
        self._ends_within_line = False
        return True

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _drop(self, data: bytes) -> None:
        lines = max(1, data.count(b"\n"))
        self._drops.lines += lines
        self.unsaid += lines

    def _fitting(self, data: bytes, size: int) -> bytes:
        """What of `data` still belongs into the file: whole lines, if it can be."""
        room = max(0, self.half_bytes - size)
        if len(data) <= room:
            return data
        cut = data.rfind(b"\n", 0, room) + 1
        if cut:
            return data[:cut]
        return b"" if size > self._header_size else data[:room]

    def _open(self) -> int:
        """The size of the file, which is open then. Raises OSError."""
        if self._fd >= 0:
            status = os.fstat(self._fd)
            if status.st_nlink and status.st_size:
                return status.st_size
            self.close()  # somebody removed or emptied it
        fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        self._fd = fd
        size = os.fstat(fd).st_size
        if size == 0:
            self._base = self._end = self._end if self._end >= 0 else _end_of(older(self.path))
            self._header_size = 0
            if self._base:
                line = _HEADER % self._base
                try:
                    self._write_whole(line, 0)
                except OSError:
                    self.close()
                    raise
                size = self._header_size = len(line)
            self._ends_within_line = False
        else:
            self._base, self._header_size = header(os.pread(fd, HEADER_MAX, 0))
            self._end = self._base + size - self._header_size
            self._ends_within_line = os.pread(fd, 1, size - 1) != b"\n"
        return size

    def _write_whole(self, line: bytes, size: int) -> None:
        """All of it or nothing: half a line of ours could be taken for the worker's. Raises OSError."""
        if os.write(self._fd, line) < len(line):
            os.ftruncate(self._fd, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _rotate(self) -> None:
        os.replace(self.path, older(self.path))
        self.close()


def _end_of(path: str) -> int:
    """How many bytes the log had at a file's end; 0 where there is no such file."""
    try:
        with open(path, "rb") as file:
            base, header_size = header(file.read(HEADER_MAX))
            return base + os.fstat(file.fileno()).st_size - header_size
    except OSError:
        return 0

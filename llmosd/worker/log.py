"""A worker's log file: what its engine prints, and the host's own words; capped, so that no engine fills a disk."""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path
from typing import Final

#: Last lines of the engine's that are kept for the reason of its end.
TAIL_LINES: Final = 12
_LINE_MAX: Final = 500


class WorkerLog:
    """Appends to one file and keeps one older one. The host's own stdout and stderr follow each rotation."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._path = path
        self._max_bytes = max_bytes
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        except OSError:
            # A host that runs as a user of its own has no way into the directory: only what it was born with.
            self._fd = os.dup(1)
        self._size = os.fstat(self._fd).st_size
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)

    def write(self, data: bytes) -> None:
        """Append. A disk that is full costs the lines; never an exception, never a blocked engine."""
        for line in data[-TAIL_LINES * _LINE_MAX :].splitlines():
            if line.strip():
                self.tail.append(line[:_LINE_MAX].decode(errors="replace"))
        try:
            if self._size + len(data) > self._max_bytes // 2:
                self._rotate()
            self._size += os.write(self._fd, data)
        except OSError:
            return  # there is nowhere to say so: the log itself cannot be written

    def say(self, text: str) -> None:
        """A line of the host's own."""
        self.write(f"llmosd: {text}\n".encode())

    def _rotate(self) -> None:
        try:
            self._path.replace(self._path.with_name(self._path.name + ".1"))
        except OSError:
            # Then the daemon keeps an older part, when it next looks. Until then nothing may fill the disk.
            self._size = os.fstat(self._fd).st_size
            if self._size > self._max_bytes:
                os.ftruncate(self._fd, 0)
                self._size = 0
            return
        fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        os.close(self._fd)
        self._fd = fd
        self._size = 0

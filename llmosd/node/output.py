"""The stdout and stderr of one life of a worker: a pipe that the log writer reads. For the node and its log writer.

Nobody who prints ever gets SIGPIPE, and nothing that was printed is lost by a death, as far as the pipe holds it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

#: Writable for all: a worker that becomes another user may open /dev/stdout. It has no name but /proc/PID/fd, which
#: only the worker's own user may follow.
_PIPE_MODE: Final = 0o622


class Reader(Protocol):
    """What an output needs of the log writer."""

    outputs: set[Output]

    async def take(self, output: Output) -> bool:
        """Have its pipe read; whether the log writer has it already. Raises OSError."""

    async def call(
        self, do: str, fds: Sequence[int] = (), *, output: Output | None = None, **told: Any
    ) -> dict[str, Any]:
        """Tell the log writer something and return its answer. Raises OSError."""


class Output:
    """The stdout and stderr of one life of a worker."""

    def __init__(self, log_writer: Reader, log: dict[str, Any]) -> None:
        self.path = Path(log["path"])
        #: The inode of its pipe, by which a later daemon knows it; 0: none.
        self.inode = 0
        self._writer = log_writer
        self.log = log
        #: Ours, so that a log writer's death loses nothing; -1: none.
        self.read_end = -1

    async def open(self) -> int:
        """A descriptor to print to, once the log writer reads it. The caller's to close. Raises OSError."""
        self.read_end, write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            os.fchmod(write_end, _PIPE_MODE)
            self.inode = os.fstat(write_end).st_ino
            await self._writer.take(self)
            # Open for reading too: whoever may print is a reader himself, and never gets SIGPIPE (fifo(7)).
            return os.open(f"/proc/self/fd/{write_end}", os.O_RDWR | os.O_CLOEXEC)
        except BaseException:
            self.close()
            raise
        finally:
            os.close(write_end)

    async def take_up(self, inode: int, pids: Callable[[], Iterable[int]]) -> str:
        """Go on with the pipe of a worker of the daemon's earlier life. Returns what is wrong; empty: nothing.

        `pids`: its processes, looked for in a thread where the log writer does not have the pipe.
        """
        self.inode = inode
        try:
            if not inode or await self._writer.take(self):
                return ""
            self.read_end = await asyncio.to_thread(lambda: _reopened(inode, pids()))
            if self.read_end >= 0:
                await self._writer.take(self)
        except OSError as error:
            return f"what it prints from now on is lost, or makes it wait: {error.strerror or error}"
        return ""

    async def say(self, text: str) -> None:
        """A line of llmosd's own in the log, if the log writer is there."""
        try:
            await self._writer.call("say", log=self.log, text=text)
        except OSError:
            return  # as any line that cannot be written

    async def end(self, text: str) -> str:
        """It has ended: a line that says so, after all that it printed. Returns its own last line."""
        try:
            answer = await self._writer.call("end", log=self.log, text=text)
        except OSError:
            return ""
        finally:
            self.close()
        return str(answer.get("last", ""))

    def close(self) -> None:
        self._writer.outputs.discard(self)
        if self.read_end >= 0:
            os.close(self.read_end)
            self.read_end = -1


def _reopened(inode: int, pids: Iterable[int]) -> int:
    """A descriptor to read a pipe from that one of the processes prints to; -1: none does. Raises PermissionError."""
    for pid in pids:
        for link in (Path(f"/proc/{pid}/fd/1"), Path(f"/proc/{pid}/fd/2")):
            try:
                # Not every pipe is ours: a shell's `exec > >(tee log)` has one of its own, which nobody else may read.
                if str(link.readlink()) != f"pipe:[{inode}]":
                    continue
                fd = os.open(link, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            except (FileNotFoundError, ProcessLookupError):
                continue
            if os.fstat(fd).st_ino == inode:
                return fd
            os.close(fd)
    return -1

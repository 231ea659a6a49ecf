"""What a worker prints, on its way to its log: its engine's output and the host's own words, through the host's stdout.

The daemon's log writer reads that pipe, writes the file and keeps it in bounds (`llmosd.logs`). Here nothing waits for
it on the event loop: what finds no room is kept until there is some, and dropped, and counted, when there is none for
PATIENCE_S. So neither a full disk nor a log writer that is gone holds an engine up for longer.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable
from typing import Final

#: Last lines of the engine's that are kept for the reason of its end.
TAIL_LINES: Final = 12
#: Seconds in which the log writer must make room: it restarts within that time, and a disk may be busy.
PATIENCE_S: Final = 3.0
_LINE_MAX: Final = 500


class WorkerLog:
    """Prints to descriptor `fd` without ever waiting there."""

    def __init__(self, fd: int = 1) -> None:
        # Opened once more: what is printed by the program itself goes through the first, and is allowed to wait.
        self._fd = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC)
        self._kept = b""
        self._ends_within_line = False
        #: Lines that were dropped and of which the log does not know yet.
        self._unsaid = 0
        self._when_room: Callable[[], None] | None = None
        self._patience: asyncio.TimerHandle | None = None
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)

    @property
    def is_full(self) -> bool:
        """There is no room for more. `when_room` tells when to go on."""
        return bool(self._kept)

    def write(self, data: bytes) -> None:
        """Append."""
        for line in data[-TAIL_LINES * _LINE_MAX :].splitlines():
            if line.strip():
                self.tail.append(line[:_LINE_MAX].decode(errors="replace"))
        if self._unsaid and not self._kept:
            # Less than PIPE_BUF: printed whole or not at all.
            start = "\n" if self._ends_within_line else ""
            if self._print(f"{start}llmosd: {self._unsaid} lines were dropped: the log was not read\n".encode()):
                self._unsaid = 0
        if self._kept or self._unsaid:
            self._drop(data)  # there is no room yet; or a word of the host's own, which did not wait for it
            return
        self._kept = data[self._print(data) :]

    def say(self, text: str) -> None:
        """A line of the host's own."""
        self.write(f"llmosd: {text}\n".encode())

    def when_room(self, call: Callable[[], None]) -> None:
        """Call once when there is room again, or patience has ended and what was kept is dropped."""
        self._when_room = call
        asyncio.get_running_loop().add_writer(self._fd, self._go_on)
        self._be_patient()

    def _be_patient(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
        self._patience = asyncio.get_running_loop().call_later(PATIENCE_S, self._give_up)

    def _go_on(self) -> None:
        printed = self._print(self._kept)
        self._kept = self._kept[printed:]
        if not self._kept:
            self._room()
        elif printed:
            self._be_patient()

    def _give_up(self) -> None:
        self._drop(self._kept)
        self._kept = b""
        self._room()

    def _room(self) -> None:
        call, self._when_room = self._when_room, None
        asyncio.get_running_loop().remove_writer(self._fd)
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
        if call is not None:
            call()

    def _print(self, data: bytes) -> int:
        """How much of it found room."""
        try:
            printed = os.write(self._fd, data)
        except BlockingIOError:
            return 0
        if printed:
            self._ends_within_line = data[printed - 1] != 0x0A
        return printed

    def _drop(self, data: bytes) -> None:
        self._unsaid += max(1, data.count(b"\n"))

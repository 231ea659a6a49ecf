"""What happened lately, for `llmos events`: a bounded log with cursors, and readers who wait for more."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final

import msgspec

from llmosd.kernel.effects import Happened

EVENTS_KEPT: Final = 10_000


class LoggedEvent(msgspec.Struct, frozen=True):
    cursor: int
    #: Seconds since 1970.
    time: float
    what: Happened


class EventLog:
    """Cursors count from 1 and go on over a restart of the daemon when `first` does."""

    def __init__(self, first: int = 1) -> None:
        self._events: deque[LoggedEvent] = deque(maxlen=EVENTS_KEPT)
        self._next = first
        self._news = asyncio.Event()

    def append(self, what: Happened, time: float) -> None:
        self._events.append(LoggedEvent(self._next, time, what))
        self._next += 1
        self._news.set()
        self._news = asyncio.Event()

    def after(self, cursor: int) -> list[LoggedEvent]:
        """Events after a cursor, as far as they are kept."""
        if not self._events:
            return []
        skip = max(0, cursor + 1 - self._events[0].cursor)
        return [self._events[index] for index in range(skip, len(self._events))]

    async def changed(self) -> None:
        """Wait for the next event."""
        await self._news.wait()
